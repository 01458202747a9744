"""Decoding ahead of the tokens that are read: the same tokens as one by one, wherever a call ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native
from llmopt.passes import FuseKernels
from llmopt.runtime import ahead as ahead_module
from llmopt.runtime import decoding as decoding_module
from llmopt.runtime import generate as generate_module
from llmopt.runtime.step import DecodeStep

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


class Seen:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.tolist())

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Decode ahead on the CPU too; counts steps that are run."""
    monkeypatch.setattr(decoding_module, "AHEAD", {"cuda", "cpu"})
    ran: list[int] = []
    run = DecodeStep.run

    def counted(step: DecodeStep) -> None:
        ran.append(len(step.ids))
        run(step)

    monkeypatch.setattr(DecodeStep, "run", counted)
    return ran


def fused(tiny: Any, family: str, **options: Any) -> Any:
    model = tiny(family, torch.float32)
    llmopt.optimize(model, passes=[FuseKernels(**options)], measure=False)
    return model


def both(model: Any, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Tokens of a call one by one, and ahead; each with what its streamer was given, and where the generator stands."""
    found = []
    options = {"do_sample": False, "pad_token_id": 0, **options}
    for devices in ({"cuda"}, {"cuda", "cpu"}):
        monkeypatch.setattr(decoding_module, "AHEAD", devices)
        streamer = Seen() if len(ids) == 1 else None
        torch.manual_seed(3)
        out = model.generate(ids, streamer=streamer, **options)
        found.append((out.tolist(), streamer and (streamer.tokens, streamer.ended), torch.get_rng_state().tolist()))
    return found[0], found[1]


@pytest.mark.parametrize("family", ["qwen3", "ernie4_5_moe", "deepseek_v3"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_tokens_are_those_of_decoding_one_by_one(
    family: str, sequences: int, tiny: Any, token_rows: Any, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = fused(tiny, family), token_rows(sequences, 9)
    for count in (1, 2, 3, 7, 40):
        want, got = both(model, monkeypatch, ids, max_new_tokens=count, eos_token_id=None)
        assert got == want
        assert len(got[0][0]) == 9 + count


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_drawn_tokens_are_those_of_drawing_one_by_one(
    family: str, sequences: int, tiny: Any, token_rows: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = fused(tiny, family), token_rows(sequences, 9)
    for options in ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}):
        asked = {"do_sample": True, "max_new_tokens": 30, **options}
        want, got = both(model, monkeypatch, ids, eos_token_id=None, **asked)
        assert got == want
        # an end in between: what was drawn beyond is taken back
        for at in (0, 2, 17):
            ends = [row[9 + at] for row in want[0]]
            want_short, got_short = both(model, monkeypatch, ids, eos_token_id=ends, **asked)
            assert got_short == want_short
            assert len(got_short[0][0]) < 39


def test_a_model_that_gives_nan_is_an_error(tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3", torch.float32)
    model.model.norm.weight.data.fill_(torch.nan)
    llmopt.optimize(model, passes=[FuseKernels()], measure=False)
    for devices in ({"cuda"}, {"cuda", "cpu"}):
        monkeypatch.setattr(decoding_module, "AHEAD", devices)
        with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan`"):
            model.generate(token_rows(1, 9), do_sample=True, max_new_tokens=5, pad_token_id=0, eos_token_id=None)


def test_no_step_is_run_beyond_the_last_token(tiny: Any, token_rows: Any, steps: list[int]) -> None:
    model, ids = fused(tiny, "qwen3"), token_rows(1, 9)
    for count in (1, 2, 5, 30):
        steps.clear()
        model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert len(steps) == count - 1


@pytest.mark.parametrize("sequences", [1, 4])
def test_sequences_end_where_they_end_one_by_one(
    sequences: int, tiny: Any, token_rows: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = fused(tiny, "qwen3"), token_rows(sequences, 9)
    mask = torch.ones_like(ids)
    mask[-1, : 3 if sequences > 1 else 0] = 0
    free = model.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    for at in (0, 1, 4, 17):
        end = int(free[0, 9 + at])
        others = [int(row[9 + at + i]) for i, row in enumerate(free[1:])]
        for ends in ([end], [end, *others]):
            want, got = both(model, monkeypatch, ids, attention_mask=mask, max_new_tokens=30, eos_token_id=ends)
            assert got == want
    steps.clear()
    model.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=[end, *others]
    )
    assert len(steps) < 29


def test_an_end_token_that_is_forbidden_is_chosen_anew(
    tiny: Any, token_rows: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for sequences in (1, 3):
        model, ids = fused(tiny, "qwen3"), token_rows(sequences, 9)
        free = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
        for at in (0, 1, 6):
            options = {"eos_token_id": int(free[0, 9 + at]), "min_new_tokens": 12, "max_new_tokens": 20}
            want, got = both(model, monkeypatch, ids, **options)
            assert got == want
            assert got[0][0][9 + at] != free[0, 9 + at]


def test_the_cache_holds_what_it_holds_one_by_one(
    tiny: Any, token_rows: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = fused(tiny, "qwen3", kv_dtype="int8"), token_rows(1, 9)
    end = int(model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)[0, -3])
    for _ in range(2):
        # again on the cache that was kept, where steps beyond the end have written
        want, got = both(model, monkeypatch, ids, max_new_tokens=30, eos_token_id=end)
        assert got == want
        longer = torch.cat([torch.tensor(got[0]), token_rows(1, 5, seed=8)], 1)
        want, got = both(model, monkeypatch, longer, max_new_tokens=12, eos_token_id=None)
        assert got == want


def test_a_cache_that_grows_meanwhile(
    tiny: Any, token_rows: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = fused(tiny, "qwen3"), token_rows(1, 9)
    step, grown = decoding_module.Decoding._step, []

    def small(loop: Any, limit: int) -> DecodeStep:
        # as where a call may be longer than what is reserved for it
        made = step(loop, min(limit, loop.length + 6))
        grown.append(made.capacity)
        return made

    monkeypatch.setattr(decoding_module.Decoding, "_step", small)
    take = generate_module.Generation._take_cache
    monkeypatch.setattr(
        generate_module.Generation, "_take_cache", lambda self, sequences, capacity: take(self, sequences, 10)
    )
    monkeypatch.setattr(generate_module.Generation, "_keep", lambda self, step: None)
    # a cache grows by some hundreds
    want, got = both(model, monkeypatch, ids, max_new_tokens=290, eos_token_id=None)
    assert got == want
    assert len(set(grown)) > 1


def test_whoever_needs_tokens_at_once_gets_them_one_by_one(
    tiny: Any, token_rows: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, ids = fused(tiny, "qwen3"), token_rows(1, 9)
    monkeypatch.setattr(decoding_module, "Ahead", lambda *args: pytest.fail("it must not run ahead"))

    class Never(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    for options in (
        {"stopping_criteria": StoppingCriteriaList([Never()])}, {"repetition_penalty": 1.3},
        {"do_sample": True, "repetition_penalty": 1.3}, {"do_sample": True, "min_new_tokens": 3, "eos_token_id": 7},
        {"return_dict_in_generate": True, "output_logits": True}, {"prompt_lookup_num_tokens": 3},
    ):  # fmt: skip
        model.generate(ids, max_new_tokens=6, pad_token_id=0, **{"eos_token_id": None, **options})


class FakeCuda:
    """Streams and events that write down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.events = 0
        self.current = "main"
        fake = self

        class Event:
            def __init__(self) -> None:
                self.name = f"event {fake.events}"
                fake.events += 1

            def record(self, stream: Any) -> None:
                fake.log.append(f"{stream.name} records {self.name}")

            def synchronize(self) -> None:
                fake.log.append(f"host waits for {self.name}")

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.name = "main" if device is None else "side"

            def wait_event(self, event: Event) -> None:
                fake.log.append(f"{self.name} waits for {event.name}")

        @contextmanager
        def stream(on: Stream) -> Iterator[None]:
            fake.log.append(f"on {on.name}")
            yield
            fake.log.append("on main")

        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
        for name, stand_in in (("Event", Event), ("Stream", Stream), ("stream", stream)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, on: self.log.append(f"kept for {on.name}"))
        monkeypatch.setattr(ahead_module, "_on_gpu", lambda tensor: True)


def test_tokens_travel_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    ring = ahead_module._Ring(torch.zeros(2, dtype=torch.int64), 3)
    assert cuda.log == ["kept for side"]
    cuda.log.clear()
    for place, value in ((0, [1, 2]), (2, [5, 6])):
        ring.put(place, torch.tensor(value))
        made, there = f"event {place}", f"event {3 + place}"
        # the step's stream goes on; the copy waits for the step, and the host for the copy
        assert cuda.log == [
            f"main records {made}",
            "on side",
            f"side waits for {made}",
            f"side records {there}",
            "on main",
        ]
        cuda.log.clear()
    for place, value in ((0, [1, 2]), (2, [5, 6])):
        assert ring.get(place).tolist() == value
        assert cuda.log.pop() == f"host waits for event {3 + place}"
