"""Recorded op calls: the same bits as direct ones, whatever changes between runs, and no trace of an error."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import tvm_ffi

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops import SPECS
from llmopt.ops.cache_attention import cache_attention
from llmopt.ops.embed import embed
from llmopt.ops.fused_linear import Weight, fused_linear
from llmopt.ops.fused_linear.spec import bits_of, weight_data
from llmopt.ops.next_token import advance, next_token
from llmopt.ops.rope_cache import rope_cache
from llmopt.runtime.program import Program

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

ENGINE_OPS = ("embed", "fused_linear", "rope_cache", "cache_attention", "next_token")
VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, CAPACITY = 300, 64, 4, 2, 16, 40


def by_name(name: str, inputs: dict[str, Any]) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A call of the torch op on one set of tensors, and those of them it writes."""
    spec = SPECS[name]
    assert spec.torch_arguments is not None
    arguments = spec.torch_arguments(**inputs)
    schema = getattr(torch.ops.llmopt, name).default._schema.arguments
    values = [arguments.get(a.name, a.default_value) for a in schema]
    written = [value for a, value in zip(schema, values, strict=True) if a.is_write and value is not None]
    return lambda: getattr(torch.ops.llmopt, name)(*values), written


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ENGINE_OPS)
def test_a_recorded_op_gives_the_bits_of_a_direct_one(
    name: str, count: int, isa: str, threads: Callable[[int], None]
) -> None:
    threads(count)
    for case in (c for c in SPECS[name].cases if not c.real):
        inputs = SPECS[name].make_inputs(case, 1)
        call, written = by_name(name, inputs)
        # new outputs hold whatever was there, and NaN is not equal to itself
        before = [x.nan_to_num_().clone() for x in written]
        call()
        expected = [x.clone() for x in written]
        for x, old in zip(written, before, strict=True):
            x.copy_(old)
        program = Program(call, written)
        assert all(torch.equal(x, old) for x, old in zip(written, before, strict=True)), "recording ran the op"
        program.run()
        assert all(torch.equal(x, want) for x, want in zip(written, expected, strict=True)), case.name


# ---- a chain: a decoder of one layer that feeds itself


class Decoder:
    """The tensors of greedy decoding, a token in each of some sequences."""

    def __init__(self, sequences: int = 3, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def weight(kind: str, rows: int, cols: int) -> Weight:
            return Weight(weight_data(kind, rows, cols, 32, g), rows, cols, bits_of(kind), 32)

        width = (HEADS + 2 * KV_HEADS) * DIM
        self.table, self.qkv_weight = weight("int8", VOCAB, HIDDEN), weight("int4", width, HIDDEN)
        self.o, self.down = weight("int4", HIDDEN, HEADS * DIM), weight("bf16", HIDDEN, 96)
        self.gate_up = [weight("int4", 96, HIDDEN) for _ in range(2)]
        self.norm, self.head_norm = torch.rand(HIDDEN, generator=g) + 0.5, torch.rand(DIM, generator=g) + 0.5
        angle = torch.rand(CAPACITY, DIM // 2, generator=g)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.ids = torch.randint(0, VOCAB, (sequences,), generator=g)
        self.seq = torch.arange(sequences, dtype=torch.int32)
        self.slot, self.start = 2 + self.seq, self.seq.clone()
        self.position = self.slot - self.start
        self.k = torch.randn(sequences, KV_HEADS, CAPACITY, DIM, generator=g).bfloat16()
        self.v = torch.randn(sequences, KV_HEADS, CAPACITY, DIM, generator=g).bfloat16()
        self.h, self.qkv = torch.empty(sequences, HIDDEN), torch.empty(sequences, width)
        self.q = torch.empty(sequences, HEADS, DIM, dtype=torch.bfloat16)
        self.attended = torch.empty(sequences, HEADS * DIM, dtype=torch.bfloat16)
        self.act, self.logits = torch.empty(sequences, 96), torch.empty(sequences, VOCAB)

    def step(self) -> None:
        """One token further in every sequence."""
        embed(self.ids, self.table, self.h)
        fused_linear(self.h, [self.qkv_weight], self.qkv, norm=self.norm, eps=1e-6)
        rope_cache(
            self.qkv, self.q, self.k, self.v, cos=self.cos, sin=self.sin, position=self.position, seq=self.seq,
            slot=self.slot, q_norm=self.head_norm, k_norm=self.head_norm, eps=1e-6,
        )  # fmt: skip
        cache_attention(
            self.q, self.k, self.v, self.attended, seq=self.seq, slot=self.slot, start=self.start, scale=DIM**-0.5
        )
        fused_linear(self.attended, [self.o], self.h, mode="add")
        fused_linear(self.h, self.gate_up, self.act, norm=self.norm, eps=1e-6, mode="swiglu")
        fused_linear(self.act, [self.down], self.h, mode="add")
        fused_linear(self.h, [self.table], self.logits, norm=self.norm, eps=1e-6)
        next_token(self.logits, self.ids)
        advance(self.position, self.slot)

    def state(self) -> list[torch.Tensor]:
        return [x.clone() for x in (self.ids, self.position, self.slot, self.k, self.v, self.h, self.logits)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def after(steps: int, sequences: int = 3, seed: int = 0) -> list[torch.Tensor]:
    """The state after direct calls."""
    decoder = Decoder(sequences, seed)
    for _ in range(steps):
        decoder.step()
    return decoder.state()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sequences", [1, 3, 12])
def test_a_recorded_chain_gives_the_bits_of_direct_calls(
    sequences: int, count: int, isa: str, threads: Callable[[int], None]
) -> None:
    expected = [after(steps, sequences) for steps in (1, 2, 5)]
    threads(count)
    decoder = Decoder(sequences)
    program = Program(decoder.step, decoder)
    for times, want in zip((1, 1, 3), expected, strict=True):
        program.run(times)
        assert same(decoder.state(), want)
    program.run(0)
    assert same(decoder.state(), expected[-1])


def test_what_is_changed_between_runs_is_seen() -> None:
    decoder, direct = Decoder(), Decoder()
    program = Program(decoder.step, decoder)
    for each, run in ((decoder, program.run), (direct, direct.step)):
        run()
        each.ids.copy_(torch.tensor([7, 8, 9]))
        each.slot.copy_(torch.tensor([30, 12, 2]))
        each.norm.mul_(2)
        run()
    assert same(decoder.state(), direct.state())


def test_a_programs_threads_stay_those_of_its_recording(threads: Callable[[int], None]) -> None:
    expected = after(2)
    for recorded, later in ((1, 3), (3, 1), (2, 4)):
        threads(recorded)
        decoder = Decoder()
        program = Program(decoder.step, decoder)
        threads(later)
        program.run(2)
        assert same(decoder.state(), expected)


def test_fewer_threads_in_the_middle_of_a_recording(threads: Callable[[int], None]) -> None:
    logits, ids = torch.randn(2, 500), torch.zeros(2, 2, dtype=torch.int64)

    def calls() -> None:
        next_token(logits, ids[0])
        threads(1)
        next_token(logits, ids[1])

    threads(4)
    Program(calls, None).run()
    assert torch.equal(ids, logits.argmax(-1).expand(2, 2))


def test_an_empty_program_runs() -> None:
    Program(lambda: None, None).run(3)


def test_two_programs_over_the_same_tensors() -> None:
    decoder = Decoder()
    first, second = Program(decoder.step, decoder), Program(decoder.step, decoder)
    first.run()
    second.run()
    decoder.step()
    assert same(decoder.state(), after(3))


# ---- errors


def test_an_error_while_recording_leaves_no_recording() -> None:
    decoder = Decoder()

    def calls() -> None:
        decoder.step()
        raise KeyError("in the middle")

    before = decoder.state()
    with pytest.raises(KeyError, match="in the middle"):
        Program(calls, decoder)
    assert same(decoder.state()[:5], before[:5])
    with pytest.raises(RuntimeError, match="record_end: nothing is being recorded"):
        native.library().record_end()
    decoder.step()  # runs at once
    assert same(decoder.state(), after(1))


def test_a_bad_call_while_recording_is_refused_there() -> None:
    decoder = Decoder()
    with pytest.raises(InputError, match=r"logits: expected shape \[2, \*\]"):
        Program(lambda: next_token(decoder.logits, decoder.ids[:2]), decoder)
    program = Program(decoder.step, decoder)
    program.run()
    assert same(decoder.state(), after(1))


def test_a_recording_inside_a_recording_is_an_error() -> None:
    decoder = Decoder()
    with pytest.raises(RuntimeError, match="record_begin: this thread is recording already"):
        Program(lambda: Program(decoder.step, decoder), decoder)
    with pytest.raises(RuntimeError, match="nothing is being recorded"):
        native.library().record_end()


def test_an_end_without_a_beginning_is_an_error_and_an_abort_is_not() -> None:
    library = native.library()
    library.record_abort()
    with pytest.raises(RuntimeError, match="record_end: nothing is being recorded"):
        library.record_end()


def test_recordings_may_follow_each_other_on_one_thread() -> None:
    library = native.library()
    x = torch.zeros(2, 1, dtype=torch.int32)
    library.record_begin()
    library.advance(x[0], x[1])
    library.record_abort()
    library.record_begin()
    library.advance(x[0], x[1])
    run = library.record_end()["run"]
    run(2)
    assert x.tolist() == [[2], [2]]


def test_running_a_program_while_recording_another_runs_it() -> None:
    decoder = Decoder()
    program = Program(decoder.step, decoder)
    outer = Program(program.run, None)
    assert same(decoder.state(), after(1))
    outer.run()
    assert same(decoder.state(), after(1))


# ---- lifetime and Python threads


def test_a_program_keeps_its_tensors_alive() -> None:
    decoder = Decoder()
    program, state, alive = Program(decoder.step, decoder), decoder.state, weakref.ref(decoder)
    del decoder, state
    gc.collect()
    for _ in range(5):
        torch.full((200_000,), torch.nan)  # what was freed would be written over
    program.run(2)
    found = alive()
    assert found is not None
    assert same(found.state(), after(2))
    del program, found
    gc.collect()
    assert alive() is None


def in_threads(*work: Callable[[], None]) -> None:
    """Runs each in a thread of its own, and raises what one raised."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=guarded, args=(call,)) for call in work]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [1, 2])
def test_programs_of_several_threads_take_turns(count: int) -> None:
    expected = [after(30, seed=seed) for seed in range(3)]
    begin = threading.Barrier(3)

    def work(seed: int) -> None:
        torch.set_num_threads(count)
        decoder = Decoder(seed=seed)
        program = Program(decoder.step, decoder)
        begin.wait()
        for _ in range(10):
            program.run(3)
        assert same(decoder.state(), expected[seed])

    in_threads(*(lambda seed=seed: work(seed) for seed in range(3)))


def test_one_program_may_be_run_from_several_threads() -> None:
    decoder = Decoder()
    program = Program(decoder.step, decoder)
    in_threads(*(lambda: [program.run() for _ in range(10)] for _ in range(3)))
    assert same(decoder.state(), after(30))


def test_a_recording_does_not_take_the_ops_of_other_threads() -> None:
    mine, other = Decoder(seed=1), Decoder(seed=2)
    recording, done = threading.Event(), threading.Event()

    def beside() -> None:
        assert recording.wait(60)
        other.step()
        assert same(other.state(), after(1, seed=2))  # it ran, and at once
        done.set()

    def calls() -> None:
        recording.set()
        assert done.wait(60)
        mine.step()

    programs: list[Program] = []
    in_threads(beside, lambda: programs.append(Program(calls, mine)))
    programs[0].run()
    assert same(mine.state(), after(1, seed=1))
    assert same(other.state(), after(1, seed=2))


def test_a_program_runs_beside_direct_ops_of_another_thread() -> None:
    decoder, direct = Decoder(seed=1), Decoder(seed=2)
    program = Program(decoder.step, decoder)
    in_threads(lambda: program.run(30), lambda: [direct.step() for _ in range(30)])
    assert same(decoder.state(), after(30, seed=1))
    assert same(direct.state(), after(30, seed=2))


def test_the_gil_is_released_while_a_program_runs() -> None:
    position, slot = torch.zeros(2, 1, dtype=torch.int32)
    program = Program(lambda: advance(position, slot), None)
    seen: list[int] = []
    worker = threading.Thread(target=program.run, args=(100_000_000,))
    worker.start()
    while worker.is_alive():
        seen.append(int(slot))
    worker.join()
    assert slot.tolist() == [100_000_000]
    assert any(0 < x < 100_000_000 for x in seen)


def kernel(x: Any, out: Any) -> None:
    torch.from_dlpack(out).copy_(torch.from_dlpack(x) + 1)


def test_a_function_from_outside_is_called_in_its_place(threads: Callable[[int], None]) -> None:
    threads(2)
    logits, ids, out = torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8)
    function = tvm_ffi.convert(kernel)

    def calls() -> None:
        native.library().record_call("kernel", function, [tvm_ffi.from_dlpack(logits), tvm_ffi.from_dlpack(out)])
        next_token(out, ids)

    program = Program(calls, (logits, ids, out))
    assert not out.any()
    for best in (3, 6):
        logits.zero_()[0, best] = 5.0
        program.run()
        assert ids.item() == best
        assert torch.equal(out, logits + 1)


def test_functions_from_outside_follow_each_other_and_ops_follow_them(threads: Callable[[int], None]) -> None:
    threads(3)
    x, between, out = torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, 8)
    ids, function = torch.zeros(1, dtype=torch.int64), tvm_ffi.convert(kernel)

    def calls() -> None:
        for a, b in ((x, between), (between, out), (out, x)):
            native.library().record_call("kernel", function, [tvm_ffi.from_dlpack(a), tvm_ffi.from_dlpack(b)])
        next_token(x, ids)

    program = Program(calls, (x, between, out, ids))
    x[0, 5] = 0.5
    for runs in range(1, 20):
        program.run()
        assert x[0].tolist() == [3.0 * runs + 0.5 * (i == 5) for i in range(8)]
        assert ids.item() == 5
    assert [name for name, _ in program.profile()] == ["kernel"] * 3 + ["next_token"]


def test_an_error_of_a_function_from_outside_comes_back() -> None:
    def failing() -> None:
        raise ValueError("not today")

    program = Program(lambda: native.library().record_call("kernel", tvm_ffi.convert(failing), []), None)
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"):
            program.run()


def test_a_function_from_outside_needs_a_recording() -> None:
    with pytest.raises(RuntimeError, match="nothing is being recorded"):
        native.library().record_call("kernel", tvm_ffi.convert(kernel), [])


def test_a_profile_names_the_calls_and_runs_them() -> None:
    decoder, ran = Decoder(), Decoder()
    program = Program(decoder.step, decoder)
    Program(ran.step, ran).run(3)
    found = program.profile(3)
    assert same(decoder.state(), ran.state())
    assert [name for name, _ in found] == [
        "embed", "fused_linear", "rope_cache", "cache_attention", *["fused_linear"] * 4, "next_token", "advance",
    ]  # fmt: skip
    assert all(seconds > 0 for _, seconds in found)
    with pytest.raises(ValueError, match="expected times of 1 or more, got 0"):
        program.profile(0)
