"""The record as one table, for the terminal and as Markdown: contenders down, cells across, ratios below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.contenders import EAGER, OURS
from benchmarks.peers.record import Record
from llmopt.measure import format as fmt
from llmopt.measure import stats
from llmopt.measure.report import Interval

_UNITS = {"read_gb_per_s": "read {} GB/s", "int8_tops": "int8 {} TOP/s", "bf16_tflops": "bf16 {} TFLOP/s"}
Lines = tuple[str, ...]


def rate_cell(record: Record, name: str, cell: str) -> Lines:
    """Median, and its interval below; a skipped cell refers to the reason by number."""
    reason = record.skipped.get(name, {}).get(cell)
    if reason is not None:
        return (f"({reasons(record).index(reason) + 1})",)
    rate = record.rate(name, cell)
    return _two(fmt.interval(rate)) if rate is not None else (fmt.NONE,)


def _two(text: str) -> Lines:
    value, _, rest = text.partition(" ")
    return (value, rest) if rest else (value,)


def reasons(record: Record) -> list[str]:
    """Why cells were skipped, each reason once, in the order of the table."""
    found = [reason for row in record.rows for reason in record.skipped.get(row.name, {}).values()]
    return list(dict.fromkeys(found))


def ratio_rows(record: Record) -> list[tuple[str, list[Lines]]]:
    """Ours over the best peer, and over the baselines."""

    def lines(value: Interval | None, beside: str = "") -> Lines:
        if value is None:
            return (fmt.NONE,)
        return (*_two(fmt.ratio(value)), *([beside] if beside else []))

    names = {row.name for row in record.rows}
    if OURS not in names:
        return []
    best = []
    for cell in record.cells:
        peer = record.best_peer(cell)
        best.append(lines(record.over(OURS, peer, cell), record.label(peer)) if peer else (fmt.NONE,))
    out = [("llmopt over the best peer", best)] if any(row.is_peer for row in record.rows) else []
    shares = [record.read_share(OURS, cell) for cell in record.cells]
    if any(shares):
        out.append(("llmopt, of the read bandwidth", [_share(share) for share in shares]))
    for row in record.rows:
        if row.name == EAGER:
            out.append((f"llmopt over {row.label}", [lines(record.over(OURS, EAGER, cell)) for cell in record.cells]))
    return out


def _share(value: Interval | None) -> Lines:
    if value is None:
        return (fmt.NONE,)
    return f"{value.value:.0%}", f"[{value.low:.0%}, {value.high:.0%}]"


def body(record: Record) -> list[tuple[str, list[Lines]]]:
    return [(row.label, [rate_cell(record, row.name, cell) for cell in record.cells]) for row in record.rows]


def footnotes(record: Record) -> list[str]:
    numbered = [f"({i + 1}) {reason}" for i, reason in enumerate(reasons(record))]
    rounds = record.settings["rounds"]
    said = f"tokens a second of all sequences together; median [95% interval] of {rounds} interleaved rounds"
    ratios = "x: rate over rate, paired by round, above 1 llmopt is faster; ≈: the interval contains 1"
    turns = ["one engine in memory at a time, all jobs of a turn in a row"] * bool(record.settings.get("one_at_a_time"))
    return [said, ratios, *turns, *_read_note(record), *numbered]


def _read_note(record: Record) -> list[str]:
    reads = next((row.info["reads"] for row in record.rows if row.name == OURS and "reads" in row.info), None)
    if reads is None:
        return []
    size, cache = reads["weights"] / 1e9, reads["cache"] / 1e3
    return [f"a token needs {size:.3f} GB of llmopt's weights (of the experts those chosen), and {cache:.1f} kB of cache "
            "per token of depth"]  # fmt: skip


def ceilings(record: Record) -> str:
    """The machine's, of the same rounds."""
    parts = [
        _UNITS[kind].format(fmt.interval(stats.interval(values)))
        for kind, values in record.ceilings.items()
        if kind in _UNITS and values
    ]
    return ", ".join(parts) or "not measured: no compiled kernels"


def machine(record: Record) -> str:
    cpu, versions = record.environment["cpu"], record.environment["versions"]
    commit = ((record.environment.get("git") or {}).get("commit") or "")[:7]
    return (
        f"{cpu['model']}, {record.settings['threads']} threads; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, llmopt {versions.get('llmopt')} ({commit}); "
        f"{record.environment['date'][:10]}"
    )


def print_table(record: Record, console: Any = None) -> None:
    """Print with rich."""
    from rich.console import Console
    from rich.table import Table

    # a file has no width: let every column keep its own
    console = console or (Console() if sys.stdout.isatty() else Console(width=160))
    table = Table(title=f"{record.shape}, tokens a second", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for cell in record.cells:
        table.add_column(cell, justify="right")
    for label, cells in body(record):
        table.add_row(label, *("\n".join(lines) for lines in cells))
    table.add_section()
    for label, cells in ratio_rows(record):
        table.add_row(label, *("\n".join(lines) for lines in cells), style="bold")
    console.print(machine(record), markup=False, highlight=False)
    console.print(table)
    console.print(f"ceilings: {ceilings(record)}", markup=False, highlight=False)
    for note in footnotes(record):
        console.print(note, markup=False, highlight=False)


def markdown(record: Record) -> str:
    """The table, then what stood behind every row."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rows = [line(["", *record.cells]), line(["---", *["--:"] * len(record.cells)])]
    rows += [line([label, *("<br>".join(lines) for lines in cells)]) for label, cells in body(record)]
    rows += [line([f"**{label}**", *("<br>".join(lines) for lines in cells)]) for label, cells in ratio_rows(record)]
    parts = [f"# {record.shape} beside its peers", machine(record), f"`{record.command}`", "\n".join(rows)]
    parts += [f"Ceilings in the same rounds: {ceilings(record)}."]
    parts += ["\n".join(f"- {note}" for note in footnotes(record)), _behind(record)]
    return "\n\n".join(parts) + "\n"


def _behind(record: Record) -> str:
    lines = ["| | what ran |", "| --- | --- |"]
    for row in record.rows:
        said = {key: value for key, value in row.info.items() if key not in ("weights", "passes", "reads")}
        passes = [f"{item['name']}: {item['verdict']}" for item in row.info.get("passes", [])]
        flat = "; ".join([f"{key} {_flat(value)}" for key, value in said.items()] + passes)
        lines.append(f"| {row.label} | {flat.replace('|', '/') or '-'} |")
    return "\n".join(lines)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value)
