"""The receipt as a picture: one line a stage, and beside each other its decode rate, time to first token, and weights.

Drawn with matplotlib's object interface on Agg: no window, no pyplot state. Colours are from Okabe and Ito's palette;
fill and hatching say the same, so that the picture survives colour blindness and grey printers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import MissingDependencyError
from llmopt.measure import format as fmt
from llmopt.measure import summary
from llmopt.measure.report import Gain, Interval, Report, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _RULE = "#222222", "#6b6b6b", "#d9d9d9"
_FILL = {"baseline": "#b3b3b3", "kept": "#0072b2", "undone": "white"}
_EDGE = {"baseline": "#b3b3b3", "kept": "#0072b2", "undone": "#d55e00"}
_CEILING = "#e3eef6"
_FONT = {"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": _INK, "hatch.linewidth": 0.7}
_BAR = 0.56  # of a row


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    verdict: str
    timing: Timing | None
    decode_gain: Interval | None
    prefill_gain: Interval | None
    weights: int | None
    quality: str
    bandwidth: float | None


@dataclass(frozen=True, slots=True)
class _Bar:
    """One bar of a panel: its length, whiskers, what is written behind it, and the ceiling it could reach."""

    value: float
    low: float
    high: float
    label: str
    ceiling: float | None = None


def draw(report: Report, path: Path) -> Path:
    """Draw ``report`` to ``path`` (PNG, or another format by its suffix) and return the path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = make_figure(report)
    figure.savefig(path)
    return path


def make_figure(report: Report) -> Figure:
    """The picture as a matplotlib figure, 12.6 inches wide.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("drawing the receipt needs matplotlib: pip install llmopt[plot]") from error
    stages = _stages(report)
    with matplotlib.rc_context(_FONT):
        height = 2.3 + 0.52 * len(stages)
        figure = Figure(figsize=(12.6, height), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        _draw_panels(figure, stages, height)
        _draw_words(figure, report, height)
    return figure


def _stages(report: Report) -> list[_Stage]:
    stages = []
    weights = report.baseline_memory.weights if report.baseline_memory else None
    if report.baseline is not None or weights is not None:
        stages.append(_Stage("eager", "baseline", report.baseline, None, None, weights, "", None))
    if report.stock is not None:
        decode, prefill = _both(report.stock_gain)
        name = summary.stock_name(report)
        stages.append(_Stage(name, "baseline", report.stock, decode, prefill, weights, "", None))
    for row in report.passes:
        if row.verdict == "not applicable":
            continue
        quality = ""
        if row.quality is not None:
            quality = f"KL {fmt.number(row.quality.mean_kl)} · top-1 {fmt.percent(row.quality.top1_agreement)}"
        decode, prefill = _both(row.total)
        own = row.memory.weights if row.memory else None
        stages.append(_Stage(row.name, row.verdict, row.timing, decode, prefill, own, quality, row.bandwidth_fraction))
    return stages


def _both(gain: Gain | None) -> tuple[Interval | None, Interval | None]:
    return (gain.decode, gain.prefill) if gain is not None else (None, None)


def _draw_panels(figure: Figure, stages: list[_Stage], height: float) -> None:
    top, bottom = 1 - 1.22 / height, 0.62 / height
    grid = figure.add_gridspec(
        1, 3, width_ratios=(1.35, 1, 1.15), left=0.175, right=0.985, top=top, bottom=bottom, wspace=0.09
    )
    panels: tuple[tuple[str, Callable[[_Stage], _Bar | None]], ...] = (
        ("Decode, tokens per second", _decode_bar),
        ("Time to first token, ms", _prefill_bar),
        ("Weights, and distance from eager's output", _weights_bar),
    )
    for column, (heading, bar_of) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        _prepare(axes, heading, stages, names=column == 0)
        _bars(axes, stages, [bar_of(stage) for stage in stages])


def _decode_bar(stage: _Stage) -> _Bar | None:
    if stage.timing is None:
        return None
    tpot, per_s = stage.timing.decode_ms, stage.timing.decode_tok_per_s
    scale = per_s * tpot.value
    label = fmt.number(per_s) + _times(stage.decode_gain)
    return _Bar(per_s, scale / tpot.high, scale / tpot.low, label, _ceiling(stage))


def _ceiling(stage: _Stage) -> float | None:
    """Tokens per second at full read bandwidth; None where that is so far off that drawing it would dwarf the rest."""
    if stage.timing is None or stage.bandwidth is None or stage.bandwidth < 0.3:
        return None
    return stage.timing.decode_tok_per_s / stage.bandwidth


def _prefill_bar(stage: _Stage) -> _Bar | None:
    if stage.timing is None:
        return None
    ttft = stage.timing.prefill_ms
    return _Bar(ttft.value, ttft.low, ttft.high, fmt.number(ttft.value) + _times(stage.prefill_gain))


def _weights_bar(stage: _Stage) -> _Bar | None:
    if stage.weights is None:
        return None
    label = fmt.size(stage.weights) + (f"   {stage.quality}" if stage.quality else "")
    return _Bar(stage.weights, stage.weights, stage.weights, label)


def _times(gain: Interval | None) -> str:
    return f"   {_marked(gain)}" if gain is not None else ""


def _marked(gain: Interval) -> str:
    """``≈`` as in the tables: the interval contains 1."""
    return fmt.times(gain.value) if gain.excludes(1.0) else f"≈{fmt.times(gain.value)}"


def _prepare(axes: Axes, heading: str, stages: list[_Stage], *, names: bool) -> None:
    axes.set_title(heading, loc="left", fontsize=9.5, color=_FAINT, pad=8)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks(range(len(stages)))
    axes.tick_params(length=0, pad=8)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_RULE)
    if not names:
        axes.set_yticklabels([])
        return
    axes.set_yticklabels([f"{s.name}\nundone" if s.verdict == "undone" else s.name for s in stages])
    for label, stage in zip(axes.get_yticklabels(), stages, strict=True):
        label.set_color({"baseline": _FAINT, "kept": _INK, "undone": _EDGE["undone"]}[stage.verdict])


def _bars(axes: Axes, stages: list[_Stage], bars: list[_Bar | None]) -> None:
    longest = max((max(bar.high, bar.ceiling or 0.0) for bar in bars if bar is not None), default=1.0)
    axes.set_xlim(0, longest)
    ends = []
    for y, (stage, bar) in enumerate(zip(stages, bars, strict=True)):
        if bar is None:
            axes.text(0, y, "  not measured" if stage.verdict != "baseline" else "", va="center", color=_FAINT)
            continue
        if bar.ceiling:
            axes.barh(y, bar.ceiling, height=_BAR, color=_CEILING, zorder=1)
        style: dict[str, Any] = {"color": _FILL[stage.verdict], "edgecolor": _EDGE[stage.verdict], "linewidth": 1}
        axes.barh(y, bar.value, height=_BAR, zorder=2, hatch="///" if stage.verdict == "undone" else None, **style)
        if bar.high > bar.low:
            whisker = [[bar.value - bar.low], [bar.high - bar.value]]
            axes.errorbar(bar.value, y, xerr=whisker, color=_INK, linewidth=1.1, capsize=2.5, capthick=1.1, zorder=3)
        end = max(bar.high, bar.ceiling or 0.0)
        color = _INK if stage.verdict == "kept" else _FAINT
        ends.append((end, axes.text(end, y, f"  {bar.label}", va="center", color=color, zorder=4)))
    _make_room(axes, longest, ends)


def _make_room(axes: Axes, longest: float, ends: list[tuple[float, Any]]) -> None:
    """Stretch the axis until the longest label behind its bar fits into the panel."""
    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    width = axes.get_window_extent(renderer).width
    needed = longest
    for end, label in ends:
        share = min(0.9, label.get_window_extent(renderer).width / width)
        needed = max(needed, end / (1 - share))
    axes.set_xlim(0, needed)


def _draw_words(figure: Figure, report: Report, height: float) -> None:
    left = 0.012
    claim = f"{summary.model_name(report)}{_claim(report)}"
    figure.text(left, 1 - 0.3 / height, claim, fontsize=14, fontweight="bold", va="center")
    conditions = [summary.machine(report), summary.software(report)]
    figure.text(left, 1 - 0.58 / height, "   ".join(conditions), fontsize=8.5, color=_FAINT, va="center")
    notes = [summary.time_caption(report)]
    if "≈" in "".join(text.get_text() for axes in figure.axes for text in axes.texts):
        notes.append("≈: the interval contains 1, no difference found")
    if any(_ceiling(stage) for stage in _stages(report)) and report.ceilings and report.ceilings.read_gb_per_s:
        limit = fmt.number(report.ceilings.read_gb_per_s.value)
        notes.append(f"pale bar: what the measured read bandwidth, {limit} GB/s, would allow")
    notes += [f"{row.name} not applicable: {row.reason}" for row in report.passes if row.verdict == "not applicable"]
    notes += report.notes
    if report.model.get("random_weights") and not any("random weights" in note for note in notes):
        notes.append("random weights: no quality figures")
    footer = textwrap.shorten("; ".join(dict.fromkeys(note for note in notes if note)), 330, placeholder=" ...")
    lines = "\n".join(textwrap.wrap(footer, 190))
    figure.text(left, 0.3 / height, lines, fontsize=8, color=_FAINT, va="center", linespacing=1.4)


def _claim(report: Report) -> str:
    """The gain in words, for the heading."""
    row = summary.final_row(report)
    if row is None or row.total is None:
        return ": not measured" if report.baseline is None else ": no pass kept"
    parts = [f"{_marked(row.total.decode)} decode", f"{_marked(row.total.prefill)} first token"]
    before, after = report.baseline_memory, summary.final_memory(report)
    if before is not None and after is not None and before.weights:
        parts.append(f"{fmt.times(after.weights / before.weights)} weights")
    return ": " + ", ".join(parts)
