"""The receipt as data. JSON is the record; the terminal table, the Markdown and the picture are views of it.

All times are milliseconds, all sizes bytes, all intervals 95% (bootstrap over interleaved rounds).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmopt.errors import InputError

SCHEMA_VERSION = 1


@dataclass(slots=True)
class Interval:
    """A median (or a ratio of paired rounds) with its 95% interval."""

    value: float
    low: float
    high: float
    rounds: int

    def excludes(self, x: float) -> bool:
        return not (self.low <= x <= self.high)


@dataclass(slots=True)
class Timing:
    """One stage of the model, timed through ``generate`` on the same prompt as every other stage."""

    prefill_ms: Interval  # time to first token (TTFT) of the whole prompt
    decode_ms: Interval  # time per output token (TPOT) after the first
    prompt_tokens: int
    decode_tokens: int
    batch: int = 1

    @property
    def decode_tok_per_s(self) -> float:
        return 1000.0 * self.batch / self.decode_ms.value


@dataclass(slots=True)
class Gain:
    """Time ratio old / new from paired rounds: above 1 is faster."""

    prefill: Interval
    decode: Interval


@dataclass(slots=True)
class Quality:
    """Outputs against the eager baseline's on held-out text."""

    tokens: int
    mean_kl: float  # nats per token, KL(baseline || stage)
    max_kl: float
    top1_agreement: float  # 0..1
    perplexity: float
    perplexity_ratio: float  # stage / baseline
    max_abs_logit_diff: float
    first_divergent_layer: str | None  # first decoder layer whose output differs by more than the dtype's rounding
    non_finite: list[str] = field(default_factory=list)  # modules whose output holds NaN or Inf


@dataclass(slots=True)
class Memory:
    """Bytes. ``weights`` are those the stage needs at rest; ``peak_rss`` is of the process while it runs, if measured."""

    weights: int
    peak_rss: int | None = None
    peak_rss_how: str = ""  # how it was measured, and what else the process held


@dataclass(slots=True)
class Ceilings:
    """What this machine can do, measured in the same rounds as the timings."""

    read_gb_per_s: Interval | None = None
    int8_tops: Interval | None = None  # dot-product instruction in force (vpdpbusd on AVX-512), 2 operations per MAC
    bf16_tflops: Interval | None = None
    threads: int = 0
    fp32_tflops: Interval | None = None
    isa: str = ""


@dataclass(slots=True)
class PassRow:
    """One pass: what it did, cost and gained, and whether it stayed."""

    name: str
    verdict: Literal["kept", "undone", "not applicable"]
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    apply_s: float = 0.0
    timing: Timing | None = None
    marginal: Gain | None = None  # over the stage before
    total: Gain | None = None  # over the eager baseline
    leave_one_out: Gain | None = None  # all kept passes against all but this one (measure="full")
    quality: Quality | None = None
    memory: Memory | None = None
    break_even_tokens: float | None = None  # decode tokens that repay apply_s; None: never, or not measured
    bandwidth_fraction: float | None = None  # of the measured read bandwidth, from the bytes decode must read
    coverage: dict[str, Any] = field(default_factory=dict)  # passes.base.Coverage as a dict
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """The receipt of one ``optimize`` call."""

    model: dict[str, Any]  # name, model_type, parameters, weight_bytes, dtype, random_weights
    environment: dict[str, Any]  # measure.environment.capture()
    settings: dict[str, Any]  # prompt and decode tokens, rounds, seed, budget, calibration
    baseline: Timing | None = None  # eager attention and eager experts
    stock: Timing | None = None  # transformers' own defaults
    stock_implementations: dict[str, str] = field(default_factory=dict)
    stock_gain: Gain | None = None  # stock over eager
    baseline_quality: Quality | None = None  # the baseline against itself: perplexity on the text
    baseline_memory: Memory | None = None
    passes: list[PassRow] = field(default_factory=list)
    ceilings: Ceilings | None = None
    notes: list[str] = field(default_factory=list)  # anything the reader must know: scaling, random weights, fallbacks
    measured_s: float = 0.0  # what measuring cost
    schema_version: int = SCHEMA_VERSION

    def kept(self) -> list[PassRow]:
        """The passes that are on, in the order in which they run."""
        return [row for row in self.passes if row.verdict == "kept"]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values: milliseconds, bytes, ratios, nats a token, as the dataclasses above say."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The record as JSON; also written to ``path`` if given."""
        return write_record(self.to_dict(), path)

    @classmethod
    def from_json(cls, source: str | Path) -> Report:
        """Read a record back from a path or from JSON text."""
        report: Report = read_record(cls, source, name="report", version=SCHEMA_VERSION)
        return report

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The receipt as Markdown tables; also written to ``path`` if given."""
        from llmopt.measure import views

        text = views.markdown(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> Path:
        """Draw the receipt as a PNG.

        Raises:
            MissingDependencyError: there is no matplotlib (``pip install llmopt[plot]``).
        """
        from llmopt.measure import plot

        return plot.draw(self, Path(path))

    def print(self) -> None:
        """Print the receipt as a table on stdout."""
        from llmopt.measure import views

        views.print_terminal(self)

    def __str__(self) -> str:
        from llmopt.measure import views

        return views.text(self)


def write_record(record: dict[str, Any], path: str | Path | None) -> str:
    """A record as JSON; also written to ``path`` if given."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=True)
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text


def read_record(kind: Any, source: str | Path, *, name: str, version: int) -> Any:
    """A dataclass back from a path or from JSON text.

    Raises:
        InputError: not JSON, of another schema version, or another kind of record.
    """
    text = Path(source).read_text(encoding="utf-8") if not str(source).lstrip().startswith("{") else str(source)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: not JSON: {error}") from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != version:
        raise InputError.argument(f"{name} schema_version", expected=str(version), got=found)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [field for field in needed if field not in data]:
        raise InputError(f"{name}: expected a record with {', '.join(needed)}, missing: {', '.join(missing)}")
    return _build(kind, data)


def _build(kind: Any, value: Any) -> Any:
    """Rebuild nested dataclasses from plain JSON, following the type hints."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _build(next(a for a in args if a is not type(None)), value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(
            **{f.name: _build(hints[f.name], value[f.name]) for f in dataclasses.fields(kind) if f.name in value}
        )
    if origin is list:
        return [_build(args[0], v) for v in value]
    return value
