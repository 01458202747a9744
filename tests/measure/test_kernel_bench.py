"""The microbenchmark refuses to time wrong results, rotates inputs, and reports rates that follow from its times."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch

from llmopt.errors import InputError
from llmopt.measure import ceilings, environment, kernel_bench, memory
from llmopt.ops.spec import Case, Inputs, OpSpec

MIB = 1 << 20


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _make_inputs(case: Case, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(case.params["n"], generator=generator)}


def spec(run: Callable[..., torch.Tensor] = _double, **rivals: Callable[..., object]) -> OpSpec:
    return OpSpec(
        name="double",
        run=run,
        reference=_double,
        make_inputs=_make_inputs,
        cases=(Case("real_n4096", {"n": 4096}, real=True), Case("odd_n7", {"n": 7}), Case("empty", {"n": 0})),
        tolerance={torch.float32: (1e-6, 1e-6)},
        bytes_moved=lambda x: 2 * x.numel() * x.element_size(),
        flops=lambda x: x.numel(),
        rivals=rivals,
    )


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose working sets are small, so that tests are quick."""
    monkeypatch.setattr(ceilings, "_buffer_bytes", lambda: 64 * MIB)
    monkeypatch.setattr(kernel_bench, "_LEAST_WORKING_SET", 1 * MIB)
    monkeypatch.setattr(environment, "l3_bytes", lambda *root: MIB // 4)


def names(**options: object) -> list[str]:
    return [case.name for _, case in kernel_bench.select([spec()], **options)]


def test_select_runs_published_shapes_unless_told_otherwise() -> None:
    assert names() == ["real_n4096"]
    assert names(all_cases=True) == ["real_n4096", "odd_n7", "empty"]
    assert names(case="odd") == ["odd_n7"]


def test_right_result_is_timed_beside_its_rival_and_rates_follow() -> None:
    seen = []
    op = spec(torch_add=lambda x: x + x)
    bench = kernel_bench.run(kernel_bench.select([op]), rounds=2, on_result=seen.append)
    (result,) = bench.results
    assert seen == [result]
    assert result.wrong is None
    assert result.max_abs_error == 0.0
    assert result.time is not None
    assert result.time.p20_us <= result.time.p50_us <= result.time.p80_us
    assert set(result.rivals) == {"torch_add"}
    assert result.times_rival("torch_add") == pytest.approx(result.rivals["torch_add"].p50_us / result.time.p50_us)
    assert result.bytes_moved == 2 * 4096 * 4
    assert result.gb_per_s == pytest.approx(result.bytes_moved / result.time.p50_us / 1e3)
    assert result.copies == 32
    assert not result.in_cache
    assert json.loads(json.dumps(bench.to_dict()))["results"][0]["op"] == "double"


@pytest.mark.parametrize(
    ("wrong_run", "why"),
    [
        (lambda x: x * 2.001, "outside rtol"),
        (lambda x: (x * 2)[:-1], "reference (4096,)"),
        (lambda x: torch.where(x > 3, torch.nan, x * 2), "NaN or Inf"),
    ],
    ids=["inexact", "shape", "nan"],
)
def test_wrong_result_is_not_timed(wrong_run: Callable[..., torch.Tensor], why: str) -> None:
    calls = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return wrong_run(x)

    (result,) = kernel_bench.run(kernel_bench.select([spec(run)]), rounds=1).results
    assert result.wrong is not None
    assert why in result.wrong
    assert result.time is None
    assert len(calls) == 1


def test_every_copy_of_the_inputs_is_used_and_they_do_not_share_memory() -> None:
    seen = set()

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.add(x.data_ptr())
        return x * 2

    (result,) = kernel_bench.run(kernel_bench.select([spec(run)]), rounds=2).results
    assert len(seen) == result.copies == 32


def test_rival_with_weights_of_its_own_prepares_them_once_a_copy() -> None:
    prepared = []

    def rival(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        prepared.append(x.data_ptr())
        weight = torch.full_like(x, 2.0)
        return lambda: x * weight

    (result,) = kernel_bench.run(kernel_bench.select([spec(prepared=rival)]), rounds=2).results
    assert len(prepared) == len(set(prepared)) == result.copies
    assert result.rivals["prepared"].p50_us > 0


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(MIB, (1, False)), (MIB // 8, (8, False)), (100, (1, True)), (0, (1, True))],
    ids=["large", "eighth", "tiny", "nothing"],
)
def test_working_set(num_bytes: int, expected: tuple[int, bool]) -> None:
    assert kernel_bench.working_set(num_bytes) == expected


def test_working_set_is_bounded_by_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * MIB)
    assert kernel_bench.working_set(MIB // 8) == (4, False)


def test_empty_case_is_checked_and_has_no_fraction() -> None:
    (result,) = kernel_bench.run(kernel_bench.select([spec()], case="empty"), rounds=1).results
    assert result.wrong is None
    assert result.read_fraction is None
    assert result.compute_fraction is None


def test_tolerance_is_of_the_inputs_dtype() -> None:
    coarse = dataclasses.replace(spec(lambda x: x * 2.001), tolerance={torch.float32: (1e-2, 1e-2)})
    assert kernel_bench.check(coarse, {"x": torch.ones(8)})[0] is None


def test_inputs_without_a_floating_tensor_take_the_tolerance_of_float32() -> None:
    assert kernel_bench.check(spec(), {"x": torch.ones(8, dtype=torch.uint8)}) == (None, 0.0)


def test_rounds_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="rounds: expected at least 1, got 0"):
        kernel_bench.run([], rounds=0)
