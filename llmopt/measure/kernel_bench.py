"""Microbenchmark of the ops in ``llmopt.ops.SPECS``: correct first, then timed beside rivals and machine ceilings.

- A case whose result is outside the op's tolerance of the reference is not timed.
- Op, rivals and ceilings take turns within each round, in shuffled order, so that drift of the machine hits them all;
  a fraction of a ceiling is the median over rounds of rate / ceiling *of that round*.
- Calls rotate through copies of the inputs that together exceed the last-level cache (and 256 MB), as the weights of a
  model do between two uses. Ops whose inputs are too small for that are timed on one copy and marked "in cache".
"""

from __future__ import annotations

import copy
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.measure import environment, memory
from llmopt.measure.ceilings import CeilingMeter, Kind
from llmopt.ops.spec import Case, Inputs, OpSpec

_LEAST_WORKING_SET = 256_000_000
_MOST_COPIES = 1024
_SAMPLE_S = 0.004  # a sample is as many calls as last this long
_SAMPLES_PER_ROUND = 3

Thunk = Callable[[], torch.Tensor]


@dataclass(slots=True)
class Spread:
    """Microseconds a call over all samples."""

    p50_us: float
    p20_us: float
    p80_us: float


@dataclass(slots=True)
class CaseResult:
    """One case of one op. ``wrong`` says why it was not timed; fractions are None where no ceiling was measured."""

    op: str
    case: str
    dtype: str
    wrong: str | None
    max_abs_error: float | None
    bytes_moved: int = 0
    flops: int = 0
    time: Spread | None = None
    rivals: dict[str, Spread] = field(default_factory=dict)
    copies: int = 1
    in_cache: bool = False
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    read_fraction: float | None = None
    compute_fraction: float | None = None
    compute_ceiling: str | None = None  # the ceiling that compute_fraction is of
    ceilings: dict[str, float] = field(default_factory=dict)  # medians over the rounds of this case

    def times_rival(self, name: str) -> float | None:
        """How many times faster than a rival, by medians."""
        return self.rivals[name].p50_us / self.time.p50_us if self.time else None


@dataclass(slots=True)
class KernelBench:
    """A whole run: results and the environment they hold for."""

    environment: dict[str, Any]
    isa: str | None
    rounds: int
    seed: int
    results: list[CaseResult]
    unavailable: dict[str, str]  # ceiling -> why it was not measured

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def select(
    specs: Iterable[OpSpec], *, case: str | None = None, all_cases: bool = False
) -> Iterator[tuple[OpSpec, Case]]:
    """The cases to run: those of published models, or every one, or those whose name contains ``case``."""
    for spec in specs:
        for candidate in spec.cases:
            if case in candidate.name if case is not None else (all_cases or candidate.real):
                yield spec, candidate


def run(
    cases: Iterable[tuple[OpSpec, Case]],
    *,
    rounds: int = 7,
    seed: int = 0,
    on_result: Callable[[CaseResult], None] | None = None,
) -> KernelBench:
    """Check and time cases; ``on_result`` sees each as it is done.

    Raises:
        InputError: ``rounds`` is below 1.
        NativeLibraryError: an op needs the compiled kernels and there are none.
    """
    if rounds < 1:
        raise InputError.argument("rounds", expected="at least 1", got=rounds)
    results = []
    with torch.inference_mode(), CeilingMeter(("read_gb_per_s", "int8_tops", "bf16_tflops", "fp32_tflops")) as meter:
        for spec, case in cases:
            result = _run_case(spec, case, meter, rounds=rounds, seed=seed)
            results.append(result)
            if on_result is not None:
                on_result(result)
    isa = native.active_isa() if native.available() else None
    reasons = {str(kind): reason for kind, reason in meter.unavailable.items()}
    return KernelBench(environment.capture(), isa, rounds, seed, results, reasons)


def _run_case(spec: OpSpec, case: Case, meter: CeilingMeter, *, rounds: int, seed: int) -> CaseResult:
    inputs = spec.make_inputs(case, seed)
    dtype = _float_dtype(inputs)
    wrong, error = check(spec, inputs)
    result = CaseResult(spec.name, case.name, str(dtype).removeprefix("torch."), wrong, error)
    if wrong is not None:
        return result
    result.bytes_moved, result.flops = spec.bytes_moved(**inputs), spec.flops(**inputs)
    result.copies, result.in_cache = working_set(result.bytes_moved)
    copies = [inputs, *(copy.deepcopy(inputs) for _ in range(result.copies - 1))]
    thunks: dict[str, list[Thunk]] = {spec.name: [functools.partial(spec.run, **each) for each in copies]}
    for name, rival in spec.rivals.items():
        thunks[name] = [_rival_thunk(rival, each) for each in copies]
    meter.samples.clear()
    samples, per_round = _time_rounds(thunks, meter, rounds=rounds, seed=seed)
    spreads = {name: _spread(values) for name, values in samples.items()}
    result.time = spreads.pop(spec.name)
    result.rivals = spreads
    result.ceilings = {kind: statistics.median(values) for kind, values in meter.samples.items()}
    _add_rates(result, [values[spec.name] for values in per_round], meter, _compute_kinds(inputs))
    return result


def _rival_thunk(rival: Callable[..., Any], inputs: Inputs) -> Thunk:
    """A rival gives the result, or, where it needs weights of its own, a function of no arguments that gives it."""
    made = rival(**inputs)
    return made if callable(made) else functools.partial(rival, **inputs)


def check(spec: OpSpec, inputs: Inputs) -> tuple[str | None, float | None]:
    """Compare the op with its reference: (why it is wrong, or None; largest absolute difference)."""
    got, want = spec.run(**inputs), spec.reference(**inputs)
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, reference {tuple(want.shape)}", None
    if got.numel() == 0:
        return None, 0.0
    got, want = got.double(), want.double()
    if not torch.isfinite(got).equal(torch.isfinite(want)):
        return "NaN or Inf where the reference has none, or the other way round", None
    difference = (got - want).abs()
    rtol, atol = spec.tolerance[_float_dtype(inputs)]
    outside = difference > atol + rtol * want.abs()
    error = float(difference.nan_to_num().max())
    if bool(outside.any()):
        return f"{int(outside.sum())} of {outside.numel()} values outside rtol {rtol:g}, atol {atol:g}", error
    return None, error


def working_set(bytes_moved: int) -> tuple[int, bool]:
    """How many copies of the inputs to rotate through, and whether they stay in cache all the same."""
    l3 = environment.l3_bytes() or 0
    wanted = max(_LEAST_WORKING_SET, 2 * l3)
    available = memory.available_bytes()
    if available is not None:
        wanted = min(wanted, available // 8)
    copies = -(-wanted // max(1, bytes_moved))
    if copies > _MOST_COPIES:
        return 1, True
    return max(1, copies), copies * bytes_moved <= l3


def _time_rounds(
    thunks: dict[str, list[Thunk]], meter: CeilingMeter, *, rounds: int, seed: int
) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
    """Samples in microseconds by implementation, and each round's medians."""
    order = list(thunks)
    shuffle = random.Random(seed).shuffle
    timers = {name: _Rotation(calls) for name, calls in thunks.items()}
    samples: dict[str, list[float]] = {name: [] for name in thunks}
    per_round = []
    for _ in range(rounds):
        meter.measure_round()
        shuffle(order)
        medians = {}
        for name in order:
            values = [timers[name].sample_us() for _ in range(_SAMPLES_PER_ROUND)]
            samples[name] += values
            medians[name] = statistics.median(values)
        per_round.append(medians)
    return samples, per_round


class _Rotation:
    """Calls one implementation on one copy of the inputs after the other."""

    def __init__(self, calls: list[Thunk]) -> None:
        self._calls = calls
        self._next = 0
        calls[0]()
        started = time.perf_counter()
        calls[-1]()
        self._calls_per_sample = max(1, round(_SAMPLE_S / max(time.perf_counter() - started, 1e-6)))

    def sample_us(self) -> float:
        calls, at = self._calls, self._next
        started = time.perf_counter()
        for _ in range(self._calls_per_sample):
            calls[at]()
            at = at + 1 if at + 1 < len(calls) else 0
        elapsed = time.perf_counter() - started
        self._next = at
        return elapsed * 1e6 / self._calls_per_sample


def _spread(values: list[float]) -> Spread:
    ordered = sorted(values)

    def quantile(q: float) -> float:
        return ordered[round(q * (len(ordered) - 1))]

    return Spread(statistics.median(ordered), quantile(0.2), quantile(0.8))


def _add_rates(result: CaseResult, round_us: list[float], meter: CeilingMeter, kinds: tuple[Kind, ...]) -> None:
    assert result.time is not None
    seconds = result.time.p50_us * 1e-6
    result.gb_per_s = result.bytes_moved / seconds / 1e9
    result.tflop_per_s = result.flops / seconds / 1e12

    def fraction(amount: float, kind: Kind) -> float | None:
        ceilings = meter.samples.get(kind)
        if not ceilings or not amount:
            return None
        return statistics.median(amount / (us * 1e-6) / top for us, top in zip(round_us, ceilings, strict=True))

    if not result.in_cache:
        result.read_fraction = fraction(result.bytes_moved / 1e9, "read_gb_per_s")
    measured = [kind for kind in kinds if kind in result.ceilings]
    if measured:
        highest = max(measured, key=lambda kind: result.ceilings[kind])
        result.compute_ceiling = highest
        result.compute_fraction = fraction(result.flops / 1e12, highest)


def _compute_kinds(inputs: Inputs) -> tuple[Kind, ...]:
    """The ceilings an op on such inputs could be bound by; the highest of them counts."""
    dtypes = {value.dtype for value in inputs.values() if isinstance(value, torch.Tensor)}
    if dtypes & {torch.uint8, torch.int8}:
        return "int8_tops", "bf16_tflops", "fp32_tflops"
    if torch.bfloat16 in dtypes:
        return "bf16_tflops", "fp32_tflops"
    return ("fp32_tflops",)


def _float_dtype(inputs: Inputs) -> torch.dtype:
    tensors = (value for value in inputs.values() if isinstance(value, torch.Tensor))
    # packed bytes alone stand for float32
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
