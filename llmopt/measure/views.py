"""The receipt for people: a terminal table, plain text, Markdown, and several models or receipts side by side.

Everything fits 100 columns. Ratios are time before / time after: above 1 is faster; ``≈`` marks an interval that
contains 1.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llmopt.measure import compared, summary
from llmopt.measure import format as fmt
from llmopt.measure.compared import ComparedRow
from llmopt.measure.comparison import Comparison
from llmopt.measure.report import Report
from llmopt.measure.summary import CostRow, TimeRow

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH = 100
_STYLES = {"kept": "green", "undone": "yellow", "not applicable": "dim", "baseline": "dim", "NaN or Inf": "bold red"}
_COST_HEADINGS = ("weights", "peak RSS", "KL nats/tok", "top-1", "perplexity", "apply s", "repaid tok")
_COMPARE_HEADINGS = ("model", "tok/s", "x eager", "TTFT ms", "weights", "KL nats/tok", "top-1")
_TIME_HEADINGS = ("TTFT ms", "TPOT ms", "tok/s", "of read BW")
_QUALITY_HEADINGS = ("whole request", "weights", "KL nats/tok", "top-1", "perplexity")
_WORDS = ("model", "stage", "verdict")  # columns of words, aligned left
_RATIO_NOTE = "x: time before / time after, above 1 is faster; ≈: the interval contains 1, no difference found"


def print_terminal(report: Report, console: Console | None = None) -> None:
    """Print the receipt; coloured on a terminal, plain elsewhere."""
    console = console or _console(None)
    _say(console, summary.title(report), style="bold", indent=0)
    _say(console, summary.machine(report), style="dim")
    _say(console, summary.software(report), style="dim")
    console.print()
    for label, value in summary.headline(report):
        _say(console, f"{label:<16}{value}", style=_STYLES.get(label, "bold"), hang=18)
    rows = summary.time_rows(report)
    if rows:
        console.print()
        console.print(_time_table(rows))
        _say(console, summary.time_caption(report), style="dim")
        _say(console, _RATIO_NOTE, style="dim")
    costs = summary.cost_rows(report)
    if costs:
        console.print()
        console.print(_cost_table(costs))
        _say(console, summary.memory_caption(report), style="dim")
    _print_details(console, report)


def _print_details(console: Console, report: Report) -> None:
    for row in report.passes:
        lines = summary.pass_lines(row)
        if not lines:
            continue
        console.print()
        _say(console, f"{row.name}: {row.verdict}", style=_STYLES[row.verdict])
        for line in lines:
            _say(console, line, indent=4, hang=6)
    remarks = summary.remark_lines(report)
    if remarks:
        console.print()
    for line in remarks:
        _say(console, line, hang=4)


def text(report: Report) -> str:
    """The terminal view as plain text, 100 columns."""
    buffer = io.StringIO()
    print_terminal(report, _console(buffer))
    return _strip(buffer.getvalue())


def _strip(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _console(file: io.StringIO | None) -> Console:
    from rich.console import Console

    if file is not None:
        return Console(file=file, width=_WIDTH, color_system=None, highlight=False)
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_WIDTH, highlight=False)


def _say(console: Console, line: str, *, style: str = "", indent: int = 2, hang: int = 2) -> None:
    """One logical line, wrapped; continuation lines start at ``hang``. Markup in it is not interpreted."""
    from rich.text import Text

    first, rest = " " * indent, " " * hang
    for piece in textwrap.wrap(line, console.width, initial_indent=first, subsequent_indent=rest):
        console.print(Text(piece, style=style))


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, *cells: str, style: str = "", name_style: str = "") -> None:
    """Cells as literal text: names come from checkpoints and intervals have brackets, neither is markup."""
    from rich.text import Text

    name, *rest = cells
    table.add_row(Text(name, style=name_style), *(Text(cell) for cell in rest), style=style)


def _time_table(rows: Sequence[TimeRow]) -> Table:
    table = _table("stage", *_TIME_HEADINGS)
    for row in rows:
        name = row.name if row.verdict in ("baseline", "kept") else f"{row.name} ({row.verdict})"
        _add_row(table, name, row.ttft, row.tpot, row.tok_per_s, row.bandwidth, name_style=_STYLES[row.verdict])
        for label, ttft, tpot in gain_lines(row):
            _add_row(table, f"  {label}", ttft, tpot, "", "", style="" if "before" in label else "dim")
    return table


def gain_lines(row: TimeRow) -> list[tuple[str, str, str]]:
    """(label, TTFT ratio, TPOT ratio) of the gains this stage has."""
    gains = (
        ("x stage before", row.ttft_before, row.tpot_before),
        ("x eager", row.ttft_eager, row.tpot_eager),
        ("x all but this", row.ttft_left_out, row.tpot_left_out),
    )
    return [gain for gain in gains if gain[1] != fmt.NONE or gain[2] != fmt.NONE]


def _cost_table(rows: Sequence[CostRow]) -> Table:
    table = _table("stage", *_COST_HEADINGS)
    for row in rows:
        _add_row(table, row.name, *_cost_cells(row), name_style=_STYLES[row.verdict])
    return table


def _cost_cells(row: CostRow) -> tuple[str, ...]:
    return row.weights, row.peak_rss, row.mean_kl, row.top1, row.perplexity, row.apply_s, row.repaid


def markdown(report: Report) -> str:
    """The receipt as GitHub-flavoured Markdown."""
    head = [line for line in (summary.machine(report), summary.software(report)) if line]
    parts = [f"## {_escape(summary.title(report))}", "  \n".join(_escape(line) for line in head)]
    parts.append("\n".join(f"- **{label}**: {_escape(value)}" for label, value in summary.headline(report)))
    rows = summary.time_rows(report)
    if rows:
        headings: tuple[str, ...] = (
            "stage",
            "verdict",
            "TTFT ms",
            "x before",
            "x eager",
            "TPOT ms",
            "x before",
            "x eager",
        )
        cells = [
            (r.name, r.verdict, r.ttft, r.ttft_before, r.ttft_eager, r.tpot, r.tpot_before, r.tpot_eager)
            + ((r.tpot_left_out,) if _has_left_out(rows) else ())
            + (r.tok_per_s, r.bandwidth)
            for r in rows
        ]
        headings += (("TPOT x all but this",) if _has_left_out(rows) else ()) + ("tok/s", "of read BW")
        parts += [_markdown_table(headings, cells), f"{summary.time_caption(report)}; {_RATIO_NOTE}."]
    costs = summary.cost_rows(report)
    if costs:
        table = [(row.name, row.verdict, *_cost_cells(row)) for row in costs]
        parts += [_markdown_table(("stage", "verdict", *_COST_HEADINGS), table), summary.memory_caption(report)]
    for row in report.passes:
        lines = summary.pass_lines(row)
        if lines:
            parts.append(f"**{row.name}: {row.verdict}**\n\n" + "\n".join(f"- {_escape(line)}" for line in lines))
    remarks = summary.remark_lines(report)
    if remarks:
        parts.append("\n".join(f"- {_escape(line)}" for line in remarks))
    return "\n\n".join(part for part in parts if part) + "\n"


def _has_left_out(rows: Iterable[TimeRow]) -> bool:
    return any(row.tpot_left_out != fmt.NONE for row in rows)


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if heading in _WORDS else "---:" for heading in headings]
    lines = [headings, rule, *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(cell: str) -> str:
    """Names come from checkpoints: nothing in them may end a cell or start markup."""
    for mark in ("\\", "|", "*", "`"):
        cell = cell.replace(mark, f"\\{mark}")
    return cell.replace("<", "&lt;")


def print_compare(reports: Sequence[Report], console: Console | None = None) -> None:
    """Print several receipts side by side: one row a model, as it was handed back."""
    console = console or _console(None)
    table = _table(*_COMPARE_HEADINGS)
    for row in compared.receipt_rows(reports):
        _add_row(table, *row, name_style="bold")
    console.print(table)
    for line in compared.receipt_remarks(reports):
        _say(console, line, hang=4)


def text_compare(reports: Sequence[Report]) -> str:
    """The comparison as plain text, 100 columns."""
    buffer = io.StringIO()
    print_compare(reports, _console(buffer))
    return _strip(buffer.getvalue())


def markdown_compare(reports: Sequence[Report]) -> str:
    """The comparison as GitHub-flavoured Markdown."""
    lines = "\n".join(f"- {_escape(line)}" for line in compared.receipt_remarks(reports))
    return f"{_markdown_table(_COMPARE_HEADINGS, compared.receipt_rows(reports))}\n\n{lines}\n"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a comparison: times, what they mean for a request and for quality, and what each model is."""
    console = console or _console(None)
    _say(console, compared.title(comparison), style="bold", indent=0)
    _say(console, summary.machine(comparison), style="dim")
    _say(console, summary.software(comparison), style="dim")
    rows = compared.rows(comparison)
    times, others = _table("model", *_TIME_HEADINGS), _table("model", *_QUALITY_HEADINGS)
    for row in rows:
        _add_row(times, row.name, row.ttft, row.tpot, row.tok_per_s, row.bandwidth, name_style="bold")
        if row is not rows[0]:
            _add_row(times, f"  x {rows[0].name}", row.ttft_first, row.tpot_first, "", "")
        _add_row(others, row.name, *_quality_cells(row), name_style="bold")
    about_times, about_others = compared.captions(comparison)
    for table, lines in ((times, (about_times, _RATIO_NOTE)), (others, (about_others,))):
        console.print()
        console.print(table)
        for line in lines:
            _say(console, line, style="dim")
    for line, details in compared.model_lines(comparison):
        console.print()
        _say(console, line, hang=4)
        for detail in details:
            _say(console, detail, indent=4, hang=6)
    console.print()
    for line in summary.remark_lines(comparison):
        _say(console, line, hang=4)


def _quality_cells(row: ComparedRow) -> tuple[str, ...]:
    return row.request, row.weights, row.mean_kl, row.top1, row.perplexity


def text_comparison(comparison: Comparison) -> str:
    """A comparison as plain text, 100 columns."""
    buffer = io.StringIO()
    print_comparison(comparison, _console(buffer))
    return _strip(buffer.getvalue())


def markdown_comparison(comparison: Comparison) -> str:
    """A comparison as GitHub-flavoured Markdown."""
    rows = compared.rows(comparison)
    ratio = f"x {rows[0].name}"
    headings = ("model", "TTFT ms", ratio, "TPOT ms", ratio, *_TIME_HEADINGS[2:], *_QUALITY_HEADINGS)
    cells = [
        (r.name, r.ttft, r.ttft_first, r.tpot, r.tpot_first, r.tok_per_s, r.bandwidth, *_quality_cells(r)) for r in rows
    ]
    head = [line for line in (summary.machine(comparison), summary.software(comparison)) if line]
    parts = [f"## {_escape(compared.title(comparison))}", "  \n".join(_escape(line) for line in head)]
    parts += [_markdown_table(headings, cells), *(f"{_escape(c)}." for c in compared.captions(comparison))]
    parts.append(f"{_RATIO_NOTE}.")
    lines = []
    for line, details in compared.model_lines(comparison):
        lines.append(f"- {_escape(line)}")
        lines += [f"  - {_escape(detail)}" for detail in details]
    lines += [f"- {_escape(line)}" for line in summary.remark_lines(comparison)]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"
