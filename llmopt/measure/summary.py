"""What a receipt says, as formatted cells and lines. The terminal, the Markdown and the picture lay these out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.measure import format as fmt
from llmopt.measure.comparison import Comparison
from llmopt.measure.report import Gain, Interval, Memory, PassRow, Quality, Report, Timing


@dataclass(frozen=True, slots=True)
class TimeRow:
    """One stage's times; gains are empty for the baselines."""

    name: str
    verdict: str
    ttft: str
    tpot: str
    tok_per_s: str
    bandwidth: str = fmt.NONE
    ttft_before: str = fmt.NONE
    tpot_before: str = fmt.NONE
    ttft_eager: str = fmt.NONE
    tpot_eager: str = fmt.NONE
    ttft_left_out: str = fmt.NONE
    tpot_left_out: str = fmt.NONE


@dataclass(frozen=True, slots=True)
class CostRow:
    """One stage's memory, quality and price."""

    name: str
    verdict: str
    weights: str
    peak_rss: str
    mean_kl: str
    top1: str
    perplexity: str
    apply_s: str = fmt.NONE
    repaid: str = fmt.NONE


def model_name(report: Report) -> str:
    """Name of the model; of a path, the last part."""
    name = str(report.model.get("name") or report.model.get("model_type") or "model")
    return Path(name).name or name if name.startswith(("/", "./", "../", "~")) else name


def title(report: Report) -> str:
    """``Qwen3-0.6B · qwen3 · 596 M parameters · bfloat16 · 1.19 GB``"""
    model = report.model
    parts = [model_name(report)]
    if model.get("model_type") and model["model_type"] != parts[0]:
        parts.append(str(model["model_type"]))
    if model.get("parameters"):
        parts.append(f"{fmt.parameters(model['parameters'])} parameters")
    if model.get("dtype"):
        parts.append(str(model["dtype"]).removeprefix("torch."))
    if model.get("weight_bytes"):
        parts.append(fmt.size(model["weight_bytes"]))
    return " · ".join(parts)


def machine(report: Report | Comparison) -> str:
    """``Intel Xeon Processor · 2 of 8 threads · avx512 · 25.3 GB``: the machine in one line."""
    env = report.environment
    cpu: dict[str, Any] = env.get("cpu") or {}
    name = str(cpu.get("model") or cpu.get("arch") or "unknown processor")
    for noise in ("(R)", "(TM)", " CPU"):
        name = name.replace(noise, "")
    parts = [" ".join(name.split("@")[0].split())]
    threads, cores = env.get("threads"), cpu.get("cores")
    if threads:
        parts.append(f"{threads} threads" if threads == cores or not cores else f"{threads} threads on {cores} cores")
    kernels: dict[str, Any] = env.get("kernels") or {}
    parts.append(str(kernels["isa"]) if kernels.get("isa") else "no compiled kernels")
    if (env.get("memory") or {}).get("total"):
        parts.append(fmt.size(env["memory"]["total"]))
    if env.get("gpu"):
        parts.append(", ".join(str(gpu) for gpu in env["gpu"]["names"]))
    return " · ".join(parts)


def software(report: Report | Comparison) -> str:
    """``torch 2.13.0 · transformers 5.23.0 · llmopt 0.1.0 (1a2b3c4, modified) · 2026-01-31``"""
    versions: dict[str, Any] = report.environment.get("versions") or {}
    parts = [f"{name} {versions[name]}" for name in ("torch", "transformers", "llmopt") if versions.get(name)]
    git = report.environment.get("git")
    if git and parts:
        parts[-1] += f" ({git['commit'][:7]}{', modified' if git.get('dirty') else ''})"
    if report.environment.get("date"):
        parts.append(str(report.environment["date"])[:10])
    return " · ".join(parts)


def final_row(report: Report) -> PassRow | None:
    """The last pass that stayed and was timed: the model as it was handed back."""
    return next((row for row in reversed(report.kept()) if row.timing is not None), None)


def final_quality(report: Report) -> Quality | None:
    """Quality of the model as it was handed back."""
    return next((row.quality for row in reversed(report.kept()) if row.quality is not None), None)


def final_memory(report: Report) -> Memory | None:
    """Memory of the model as it was handed back."""
    return next((row.memory for row in reversed(report.kept()) if row.memory is not None), None)


def headline(report: Report) -> list[tuple[str, str]]:
    """What was gained, what it cost in quality, which passes stayed: label and text."""
    lines: list[tuple[str, str]] = []
    row = final_row(report)
    if report.baseline is None:
        lines.append(("speed", "not measured"))
    elif row is None or row.timing is None:
        lines.append(("speed", "as before: no pass was kept" if not report.kept() else "not measured"))
    else:
        before, after = report.baseline, row.timing
        prefill, decode = _both(row.total)
        lines.append(("decode", _change(before.decode_tok_per_s, after.decode_tok_per_s, "tok/s", decode)))
        lines.append(("TTFT", _change(before.prefill_ms.value, after.prefill_ms.value, "ms", prefill)))
    lines += _memory_line(report)
    quality = final_quality(report)
    if quality is not None:
        lines.append(("quality", _quality_text(quality)))
        if quality.non_finite:
            lines.append(("NaN or Inf", ", ".join(quality.non_finite)))
    elif report.model.get("random_weights"):
        lines.append(("quality", "random weights: no quality figures"))
    for verdict in ("kept", "undone", "not applicable"):
        names = [row.name for row in report.passes if row.verdict == verdict]
        if names or verdict == "kept":
            lines.append((verdict, ", ".join(names) or "none"))
    return lines


def _change(before: float, after: float, unit: str, gain: Interval | None) -> str:
    ratio = f"   {fmt.ratio(gain)} over eager" if gain is not None else ""
    return f"{fmt.number(before)} → {fmt.number(after)} {unit}{ratio}"


def _memory_line(report: Report) -> list[tuple[str, str]]:
    before, after = report.baseline_memory, final_memory(report)
    if before is None or after is None or not before.weights:
        return []
    share = fmt.times(after.weights / before.weights)
    return [("weights", f"{fmt.size(before.weights)} → {fmt.size(after.weights)}   {share}")]


def _quality_text(quality: Quality) -> str:
    return (
        f"KL {fmt.number(quality.mean_kl)} nats/token, top-1 {fmt.percent(quality.top1_agreement)}, "
        f"perplexity {quality.perplexity_ratio:.4f}x"
    )


def time_rows(report: Report) -> list[TimeRow]:
    """Eager, stock, and each pass that was timed, in order. Empty when nothing was."""
    rows = []
    if report.baseline is not None:
        rows.append(_time_row("eager", "baseline", report.baseline))
    if report.stock is not None:
        gain = report.stock_gain
        rows.append(_time_row(stock_name(report), "baseline", report.stock, eager=gain))
    for row in report.passes:
        if row.timing is not None:
            rows.append(
                _time_row(
                    row.name, row.verdict, row.timing, before=row.marginal, eager=row.total,
                    left_out=row.leave_one_out, bandwidth=row.bandwidth_fraction,
                )
            )  # fmt: skip
    return rows


def stock_name(report: Report) -> str:
    """``stock (sdpa, grouped_mm)``"""
    names = list(dict.fromkeys(report.stock_implementations.values()))
    return f"stock ({', '.join(names)})" if names else "stock"


def _time_row(
    name: str,
    verdict: str,
    timing: Timing,
    *,
    before: Gain | None = None,
    eager: Gain | None = None,
    left_out: Gain | None = None,
    bandwidth: float | None = None,
) -> TimeRow:
    return TimeRow(
        name,
        verdict,
        fmt.interval(timing.prefill_ms),
        fmt.interval(timing.decode_ms),
        fmt.number(timing.decode_tok_per_s),
        fmt.percent(bandwidth, 0),
        *(fmt.ratio(ratio) for gain in (before, eager, left_out) for ratio in _both(gain)),
    )


def _both(gain: Gain | None) -> tuple[Interval | None, Interval | None]:
    return (gain.prefill, gain.decode) if gain is not None else (None, None)


def cost_rows(report: Report) -> list[CostRow]:
    """Memory, quality and price of the baseline and of each pass that was applied."""
    rows = []
    if report.baseline_memory is not None or report.baseline_quality is not None:
        rows.append(_cost_row("eager", "baseline", report.baseline_memory, report.baseline_quality))
    for row in report.passes:
        if row.verdict == "not applicable":
            continue
        repaid = fmt.count(row.break_even_tokens)
        apply_s = fmt.number(row.apply_s)
        rows.append(_cost_row(row.name, row.verdict, row.memory, row.quality, apply_s=apply_s, repaid=repaid))
    return rows


def _cost_row(
    name: str,
    verdict: str,
    memory: Memory | None,
    quality: Quality | None,
    *,
    apply_s: str = fmt.NONE,
    repaid: str = fmt.NONE,
) -> CostRow:
    mean_kl, top1, perplexity = quality_cells(quality, is_reference=verdict == "baseline")
    weights = fmt.size(memory.weights) if memory else fmt.NONE
    peak = fmt.size(memory.peak_rss) if memory else fmt.NONE
    return CostRow(name, verdict, weights, peak, mean_kl, top1, perplexity, apply_s, repaid)


def quality_cells(quality: Quality | None, *, is_reference: bool) -> tuple[str, str, str]:
    """KL, top-1 and perplexity: the latter as it is for what others are held against, as a ratio for those."""
    if quality is None:
        return fmt.NONE, fmt.NONE, fmt.NONE
    if is_reference:
        return fmt.NONE, fmt.NONE, fmt.number(quality.perplexity)
    ratio = f"{quality.perplexity_ratio:.4f}x"
    return fmt.number(quality.mean_kl), fmt.percent(quality.top1_agreement, 2), ratio


def time_caption(report: Report) -> str:
    """How the times were taken."""
    timing = report.baseline or next((row.timing for row in report.passes if row.timing), None)
    return timing_caption(timing) if timing is not None else ""


def timing_caption(timing: Timing) -> str:
    """How times like this one were taken."""
    return (
        f"prompt {timing.prompt_tokens} tokens, {timing.decode_tokens} decoded, batch {timing.batch}; "
        f"median [95% interval] of {timing.decode_ms.rounds} interleaved rounds"
    )


def memory_caption(report: Report) -> str:
    """What the peak RSS column is of."""
    memories = [report.baseline_memory, *(row.memory for row in report.passes)]
    hows = dict.fromkeys(m.peak_rss_how for m in memories if m is not None and m.peak_rss is not None)
    texts = [how for how in hows if how]
    return f"peak RSS: {'; '.join(texts)}" if texts else ""


def ceilings_line(report: Report | Comparison) -> str:
    """``read 17.4 GB/s [..], int8 0.62 TOP/s [..] on 2 threads``"""
    ceilings = report.ceilings
    if ceilings is None:
        return ""
    named = (
        ("read", ceilings.read_gb_per_s, "GB/s"),
        ("int8", ceilings.int8_tops, "TOP/s"),
        ("bf16", ceilings.bf16_tflops, "TFLOP/s"),
    )
    parts = [f"{name} {fmt.interval(value)} {unit}" for name, value, unit in named if value is not None]
    where = f"{ceilings.threads} threads" if ceilings.threads else ceilings.isa  # a GPU's name
    return f"{', '.join(parts)}; {where}" if parts else ""


def quality_lines(quality: Quality | None) -> list[str]:
    """From which layer on the outputs differ, by how much at most, and where they hold NaN or Inf."""
    lines = []
    if quality is not None and quality.first_divergent_layer:
        lines.append(
            f"differs from layer {quality.first_divergent_layer} on; largest KL {fmt.number(quality.max_kl)}"
            f", largest logit difference {fmt.number(quality.max_abs_logit_diff)}"
        )
    if quality is not None and quality.non_finite:
        lines.append(f"NaN or Inf in {', '.join(quality.non_finite)}")
    return lines


def pass_lines(row: PassRow) -> list[str]:
    """Reason, coverage, what really runs, skips and divergence of one pass."""
    lines = [row.reason] if row.reason else []
    coverage = row.coverage
    if coverage.get("touched"):
        text = f"{coverage['touched']} modules"
        if coverage.get("share_of_weight_bytes"):
            text += f", {fmt.percent(coverage['share_of_weight_bytes'])} of the weight bytes"
        before, after = coverage.get("weight_bytes_before"), coverage.get("weight_bytes_after")
        if before and after and before != after:
            text += f": {fmt.size(before)} → {fmt.size(after)} ({fmt.percent(after / before)})"
        lines.append(text)
    if share := row.details.get("quantized_bytes_ratio"):
        lines.append(f"4-bit linears and experts: {fmt.percent(share)} of their bytes")
    if coverage.get("implementations"):
        lines.append("runs " + ", ".join(f"{kind}: {name}" for kind, name in coverage["implementations"].items()))
    lines += row.details.get("said", [])
    lines += [f"skipped {text}" for text in _skips(coverage.get("skipped") or {})]
    return [*lines, *quality_lines(row.quality)]


def _skips(skipped: dict[str, str]) -> list[str]:
    """One line a reason, with the first modules that have it."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        by_reason[reason].append(name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{', '.join(names[:3])}{more}: {reason}")
    return lines


def remark_lines(report: Report | Comparison) -> list[str]:
    """Ceilings, notes, and what measuring cost."""
    lines = []
    if ceilings := ceilings_line(report):
        lines.append(f"machine: {ceilings}")
    lines += [f"note: {note}" for note in report.notes]
    if report.measured_s:
        lines.append(f"measuring took {report.measured_s:.0f} s")
    return lines
