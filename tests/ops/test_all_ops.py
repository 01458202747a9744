"""Every op of ``llmopt.ops.SPECS`` against its reference, on every instruction set this processor has."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import fenced
import pytest
import torch
from torch import nn

from llmopt import native
from llmopt.ops import SPECS
from llmopt.ops.int4_linear import layout
from llmopt.ops.spec import Case, Inputs, OpSpec

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

SMALL = {name: [c for c in spec.cases if not c.real] for name, spec in SPECS.items()}
FLOAT32_ONLY = {"next_token", "sample_token"}
HEAVY_WEIGHTS, HEAVY_TOKENS = 50_000_000, 512


def is_heavy(case: Case) -> bool:
    """Too much for the portable loops: a whole output head, a layer of experts, or a long prompt."""
    p = case.params
    listed = p.get("weights")
    rows = p.get("n", 0) + (sum(n for n, _ in listed) if isinstance(listed, tuple | list) else 0)
    weights = rows * p.get("k", 0) + 3 * p.get("experts", 0) * p.get("hidden", 0) * p.get("intermediate", 0)
    return weights > HEAVY_WEIGHTS or p.get("tokens", 0) >= HEAVY_TOKENS


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    return dataclasses.replace(case, params={**case.params, "dtype": dtype})


def against_reference() -> list[Any]:
    found = []
    for name, spec in SPECS.items():
        for case in spec.cases:
            heavy = is_heavy(case)
            dtypes = case.params.get("dtypes", spec.tolerance)
            for dtype in [case.params.get("dtype", torch.float32)] if heavy else dtypes:
                marks = [pytest.mark.slow] if heavy else []
                found.append(pytest.param(name, case, dtype, id=f"{name}-{case.name}-{short(dtype)}", marks=marks))
    return found


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def small_cases(*, most: int | None = None) -> list[Any]:
    return [
        pytest.param(SPECS[name], case, id=f"{name}-{case.name}")
        for name, cases in SMALL.items()
        for case in cases[:most]
    ]


every_small_case = pytest.mark.parametrize(("spec", "case"), small_cases())
every_op = pytest.mark.parametrize("name", list(SPECS))


def biggest_small(name: str) -> Case:
    """The small case with the most tokens: it reaches every block size and its tails."""
    return max(SMALL[name], key=lambda c: c.params.get("tokens", 0))


@pytest.mark.parametrize(("name", "case", "dtype"), against_reference())
def test_every_case_agrees_with_the_reference(
    name: str, case: Case, dtype: torch.dtype, nan_memory: None, request: pytest.FixtureRequest
) -> None:
    spec = SPECS[name]
    inputs = spec.make_inputs(in_dtype(case, dtype), 1)
    floating = {v.dtype for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    assert dtype in floating or (not floating and dtype == torch.float32)
    expected = spec.reference(**inputs)
    rtol, atol = spec.tolerance[dtype]
    isas = request.config.llmopt_isas  # type: ignore[attr-defined]
    try:
        for isa in isas[-1:] if is_heavy(case) else isas:
            native.force_isa(isa)
            got = spec.run(**inputs)
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda text, isa=isa: f"{isa}: {text}")
    finally:
        native.force_isa("auto")


def test_every_op_names_itself_and_has_small_and_real_cases() -> None:
    for name, spec in SPECS.items():
        assert spec.name == name
        assert SMALL[name], name
        assert any(c.real for c in spec.cases), name
        assert len({c.name for c in spec.cases}) == len(spec.cases), name
        assert name in FLOAT32_ONLY or {torch.float32, torch.bfloat16, torch.float16} == set(spec.tolerance), name
        assert torch.float32 in spec.tolerance, name


@every_op
def test_traffic_and_work_are_counted(name: str) -> None:
    spec = SPECS[name]
    for case in SMALL[name]:
        inputs = spec.make_inputs(case, 0)
        empty = any(isinstance(v, torch.Tensor) and v.numel() == 0 for v in inputs.values())
        assert spec.bytes_moved(**inputs) >= 0
        assert (spec.flops(**inputs) == 0) == empty, case.name


# ---- views: any offset, any row stride


def displaced(x: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, ``offset`` elements into a larger buffer; what lies around is NaN or 0xA5."""
    buffer = torch.empty(x.numel() + 128, dtype=x.dtype)
    buffer.fill_(torch.nan if x.is_floating_point() else 0xA5 if x.dtype == torch.uint8 else -1)
    view = buffer[offset : offset + x.numel()].view(x.shape)
    view.copy_(x)
    assert view.storage_offset() == offset
    return view


def with_tensors(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    return {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@every_small_case
def test_misaligned_views_give_the_same(spec: OpSpec, case: Case, isa: str, nan_memory: None) -> None:
    inputs = spec.make_inputs(case, 2)
    expected = spec.run(**inputs)
    for offset in (1, 7, 33, 63):
        got = spec.run(**with_tensors(inputs, lambda x, offset=offset: displaced(x, offset)))
        assert torch.equal(got, expected), offset


@every_op
def test_packed_bytes_may_start_anywhere(name: str, isa: str) -> None:
    spec = SPECS[name]
    inputs = spec.make_inputs(biggest_small(name), 2)
    expected = spec.run(**inputs)
    for offset in range(1, 64):
        moved = {
            k: displaced(v, offset) if isinstance(v, torch.Tensor) and v.dtype == torch.uint8 else v
            for k, v in inputs.items()
        }
        assert torch.equal(spec.run(**moved), expected), offset


def widened(x: torch.Tensor) -> torch.Tensor:
    """The same values with rows further apart; the gaps hold NaN."""
    if not x.is_floating_point() or x.dim() < 2:
        return x
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
    view = buffer[..., 2 : 2 + x.shape[-1]]
    view.copy_(x)
    return view


@every_small_case
def test_rows_may_lie_apart(spec: OpSpec, case: Case, isa: str) -> None:
    inputs = spec.make_inputs(case, 3)
    assert torch.equal(spec.run(**with_tensors(inputs, widened)), spec.run(**inputs))


@every_small_case
def test_inputs_stay_as_they_are(spec: OpSpec, case: Case, isa: str) -> None:
    inputs = spec.make_inputs(case, 4)
    before = with_tensors(inputs, torch.clone)
    spec.run(**inputs)
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(inputs[key], value), key


GUARDED = """
import torch
from fenced import KEEP, fenced
from llmopt import native
from llmopt.ops import SPECS

torch.set_num_threads(1)
for name, spec in SPECS.items():
    for case in spec.cases:
        if case.real:
            continue
        inputs = spec.make_inputs(case, 0)
        for isa in sys.argv[2:]:
            native.force_isa(isa)
            expected = spec.run(**inputs)
            for at_end in (True, False):
                print(name, case.name, isa, at_end, flush=True)
                moved = {k: fenced(v, at_end=at_end) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                assert torch.equal(spec.run(**moved), expected)
                KEEP.clear()
print("done", flush=True)
"""


def test_nothing_is_read_outside_the_tensors(request: pytest.FixtureRequest) -> None:
    fenced.run(GUARDED, request.config.llmopt_isas)  # type: ignore[attr-defined]


# ---- what else a caller may rely on


@every_op
def test_scratch_of_an_earlier_call_is_not_read(name: str, isa: str) -> None:
    spec = SPECS[name]
    cases = sorted(SMALL[name], key=lambda c: c.params.get("tokens", 0))
    expected = [spec.run(**spec.make_inputs(case, 5)) for case in cases]
    spoil = spec.make_inputs(cases[-1], 6)
    spoil = with_tensors(spoil, lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x)
    for case, want in zip(cases, expected, strict=True):
        spec.run(**spoil)
        assert torch.equal(spec.run(**spec.make_inputs(case, 5)), want), case.name


@every_op
def test_one_and_two_threads_agree_bit_by_bit(name: str, isa: str, threads: Callable[[int], None]) -> None:
    spec = SPECS[name]
    for case in SMALL[name]:
        inputs = spec.make_inputs(case, 7)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(spec.run(**inputs))
        assert torch.equal(results[0], results[1]), case.name
        assert torch.equal(results[0], results[2]), case.name


@every_op
def test_python_threads_may_share_the_weights(name: str) -> None:
    spec = SPECS[name]
    base = spec.make_inputs(biggest_small(name), 8)
    calls = []
    for i in range(4):
        other = spec.make_inputs(biggest_small(name), 9 + i)
        calls.append(
            {k: base[k] if isinstance(v, torch.Tensor) and v.dtype == torch.uint8 else v for k, v in other.items()}
        )
    expected = [spec.run(**call) for call in calls]
    wrong: list[int] = []
    start = threading.Barrier(len(calls))

    def work(i: int) -> None:
        torch.set_num_threads(1 + i % 2)
        start.wait()
        wrong.extend(i for _ in range(20) if not torch.equal(spec.run(**calls[i]), expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    assert wrong == []


# ---- torch.library


def registered() -> list[str]:
    """Names of all torch ops of the project."""
    for spec in SPECS.values():
        assert spec.run is not None  # importing the specs registers the ops
    names = {
        n.removeprefix("llmopt::").partition(".")[0] for n in torch._C._dispatch_get_all_op_names() if "llmopt::" in n
    }
    return sorted(names)


def quant_rows_inputs() -> Inputs:
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 256, (37, 100), generator=g, dtype=torch.uint8)
    packed = layout.pack(q, torch.rand(37, 2, generator=g), None, group_size=64, bits=8)
    return {"ids": torch.tensor([[0, 36, 5], [5, 1, 2]]), "packed": packed, "out_features": 37, "in_features": 100,
            "group_size": 64, "bits": 8, "asymmetric": False}  # fmt: skip


# ops that share a folder with another and have no spec of their own
SAMPLES: dict[str, Callable[[], Inputs]] = {"quant_rows": quant_rows_inputs}


def samples(name: str) -> list[Inputs]:
    if name in SAMPLES:
        return [SAMPLES[name]()]
    spec = SPECS[name]
    chosen = [SMALL[name][0], SMALL[name][1], biggest_small(name)]
    return [spec.make_inputs(case, 10) for case in chosen]


def by_schema(name: str, inputs: Inputs) -> list[Any]:
    """The torch op's arguments, in its order; new outputs among them, if it writes to those it is given."""
    spec = SPECS.get(name)
    arguments = spec.torch_arguments(**inputs) if spec is not None and spec.torch_arguments is not None else inputs
    return [
        arguments[a.name] if a.name in arguments or not a.has_default_value() else a.default_value
        for a in schema_of(name).arguments
    ]


def schema_of(name: str) -> Any:
    return getattr(torch.ops.llmopt, name).default._schema


def result_of(name: str, inputs: Inputs) -> torch.Tensor:
    """What the torch op returns, or what it writes, flat."""
    values = by_schema(name, inputs)
    returned: torch.Tensor | None = getattr(torch.ops.llmopt, name)(*values)
    if returned is not None:
        return returned.flatten()
    arguments = zip(schema_of(name).arguments, values, strict=True)
    return torch.cat([value.flatten() for argument, value in arguments if argument.is_write and value is not None])


@pytest.mark.parametrize("name", registered())
def test_torch_sees_a_proper_op(name: str) -> None:
    op = getattr(torch.ops.llmopt, name).default
    for inputs in samples(name):
        outcome = torch.library.opcheck(op, by_schema(name, inputs))
        assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize("name", registered())
def test_the_torch_op_and_the_function_agree(name: str) -> None:
    for inputs in samples(name):
        if name in SPECS:
            expected = SPECS[name].run(**inputs)
        else:
            from llmopt.ops.int8_linear import quant_rows

            expected = quant_rows(**inputs)
        assert torch.equal(result_of(name, inputs), expected.flatten())


class Caller(nn.Module):
    """An op between two operations that the compiler knows."""

    def __init__(self, run: Callable[..., torch.Tensor], options: Inputs) -> None:
        super().__init__()
        self.run = run
        self.options = {k: v for k, v in options.items() if not isinstance(v, torch.Tensor)}

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        scaled = {k: v * 2 if v.is_floating_point() else v for k, v in tensors.items()}
        return self.run(**scaled, **self.options) + 1


@every_op
def test_compile_sees_through_the_op(name: str) -> None:
    spec = SPECS[name]
    inputs = {k: v for k, v in spec.make_inputs(biggest_small(name), 11).items() if v is not None}
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    module = Caller(spec.run, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors), module(tensors))
