"""Several models side by side, as formatted cells and lines: measured together, or as receipts of separate runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.measure import format as fmt
from llmopt.measure import summary
from llmopt.measure.comparison import Comparison
from llmopt.measure.report import Report

# two tables of 100 columns have room for this much of a name
_NAME_WIDTH = 26


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One model of a comparison; ratios are empty for the first."""

    name: str
    ttft: str
    tpot: str
    tok_per_s: str
    bandwidth: str
    ttft_first: str
    tpot_first: str
    request: str
    weights: str
    mean_kl: str
    top1: str
    perplexity: str


def rows(comparison: Comparison) -> list[ComparedRow]:
    """One row a model, in the order given."""
    first = comparison.rows[0].memory.weights
    found = []
    for i, (name, row) in enumerate(zip(names(comparison), comparison.rows, strict=True)):
        weights = fmt.size(row.memory.weights)
        if i and first:
            weights += f", {fmt.times(row.memory.weights / first)}"
        found.append(
            ComparedRow(
                name,
                fmt.interval(row.timing.prefill_ms),
                fmt.interval(row.timing.decode_ms),
                fmt.number(row.timing.decode_tok_per_s),
                fmt.percent(row.bandwidth_fraction, 0),
                fmt.ratio(row.gain.prefill if row.gain else None),
                fmt.ratio(row.gain.decode if row.gain else None),
                fmt.ratio(row.request),
                weights,
                *summary.quality_cells(row.quality, is_reference=i == 0),
            )
        )
    return found


def names(comparison: Comparison) -> list[str]:
    """Names as short as the tables need them, and still different."""
    return _numbered([_short(row.name) for row in comparison.rows])


def _short(name: str) -> str:
    most = _NAME_WIDTH - len(" #99")
    return name if len(name) <= _NAME_WIDTH else f"{name[: most // 2]}…{name[len(name) - most + most // 2 + 1 :]}"


def _numbered(found: list[str]) -> list[str]:
    return [f"{name} #{i + 1}" if found.count(name) > 1 else name for i, name in enumerate(found)]


def title(comparison: Comparison) -> str:
    """``3 models, measured in the same rounds``"""
    count = len(comparison.rows)
    return f"{count} models, measured in the same rounds" if count > 1 else "1 model"


def captions(comparison: Comparison) -> tuple[str, str]:
    """How the times of the first table were taken, and what the second table is of."""
    settings, first = comparison.settings, comparison.rows[0]
    timing = first.timing
    request = f"whole request: {timing.prompt_tokens} tokens in, {settings.get('request_tokens')} out"
    tokens = max((row.quality.tokens for row in comparison.rows if row.quality is not None), default=0)
    quality = f"; KL, top-1, perplexity: against {first.name} on {tokens} tokens of held-out text" if tokens else ""
    return f"{summary.timing_caption(timing)}; prompt: {settings.get('prompt')}", request + quality


def model_lines(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Of each model its name and what it is, and what must be known of its figures."""
    return [
        (f"{row.name}: {describe(row.model)}", [*summary.quality_lines(row.quality), *row.notes])
        for row in comparison.rows
    ]


def describe(model: dict[str, Any]) -> str:
    """``qwen3 · 28 layers of 1024 · vocabulary 151,936 · int4 g128, int8 g128, bfloat16 · attention sdpa``"""
    parts = [str(model.get("model_type") or "model")]
    if model.get("layers"):
        parts.append(f"{model['layers']} layers of {model.get('hidden_size')}")
    if model.get("vocab_size"):
        parts.append(f"vocabulary {model['vocab_size']:,}")
    if model.get("weights"):
        parts.append(str(model["weights"]))
    if model.get("attention"):
        parts.append(f"attention {model['attention']}")
    if model.get("experts"):
        parts.append(f"experts {model['experts']}")
    if model.get("passes"):
        parts.append(f"kept {', '.join(model['passes'])}")
    if model.get("random_weights"):
        parts.append("random weights")
    return " · ".join(parts)


# ---- receipts of separate runs


def receipt_rows(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """One row a report: name, tok/s, decode gain over its own eager, TTFT, weights, KL, top-1, as handed back."""
    found: list[tuple[str, ...]] = []
    for name, report in zip(_report_names(reports), reports, strict=True):
        row, quality = summary.final_row(report), summary.final_quality(report)
        memory = summary.final_memory(report) or report.baseline_memory
        timing = row.timing if row is not None else report.baseline
        found.append(
            (
                name,
                fmt.number(timing.decode_tok_per_s) if timing else fmt.NONE,
                fmt.ratio(row.total.decode) if row is not None and row.total else fmt.NONE,
                fmt.interval(timing.prefill_ms) if timing else fmt.NONE,
                fmt.size(memory.weights) if memory else fmt.NONE,
                fmt.number(quality.mean_kl) if quality else fmt.NONE,
                fmt.percent(quality.top1_agreement, 2) if quality else fmt.NONE,
            )
        )
    return found


def _report_names(reports: Sequence[Report]) -> list[str]:
    """Names of the models, numbered where two have the same."""
    return _numbered([summary.model_name(report) for report in reports])


def receipt_remarks(reports: Sequence[Report]) -> list[str]:
    """Passes that stayed in each, and what keeps the rows from being comparable."""
    lines = []
    for name, report in zip(_report_names(reports), reports, strict=True):
        kept = ", ".join(row.name for row in report.kept()) or "none"
        lines.append(f"{name}: kept {kept}")
        lines += [f"{name}: {note}" for note in report.notes]
    conditions: dict[str, set[Any]] = {
        "machines": {summary.machine(report) for report in reports},
        "library versions": {str(report.environment.get("versions")) for report in reports},
        "prompt, decode length or batch": {
            (t.prompt_tokens, t.decode_tokens, t.batch) for report in reports if (t := report.baseline) is not None
        },
    }
    if len({report.environment.get("date") for report in reports}) > 1:
        lines.append("measured at different times, not in the same rounds: small differences mean nothing")
    different = [name for name, values in conditions.items() if len(values) > 1]
    return [*lines, f"not comparable: different {' and '.join(different)}"] if different else lines
