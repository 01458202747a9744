"""What the command line prints: progress and warnings on stderr, tables or JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from llmopt.measure.kernel_bench import CaseResult, KernelBench, Spread
    from llmopt.passes.base import Event

STDOUT = Path("-")


def write_json(data: Any, target: Path) -> None:
    """Write ``data`` to a file, or to stdout for ``-``."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if target == STDOUT:
        sys.stdout.write(text + "\n")
    else:
        target.write_text(text + "\n", encoding="utf-8")


@contextmanager
def progress() -> Iterator[Callable[[Event], None]]:
    """A client of ``on_event``: a bar on stderr where that is a terminal; warnings are printed everywhere."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda event: _warn(console, event)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def on_event(event: Event) -> None:
            if event.kind in ("warning", "verdict"):
                _warn(bar.console, event)
            else:
                label = f"{event.name}: {event.message}" if event.message else event.name
                bar.update(task, description=label[:60], completed=event.done, total=event.total or None)

        yield on_event


def _warn(console: Console, event: Event) -> None:
    from rich.text import Text

    if event.kind == "warning":
        console.print(Text(f"warning: {event.name}: {event.message}"), soft_wrap=True)
    elif event.kind == "verdict" and console.is_terminal:
        console.print(Text(f"{event.name}: {event.message}"), soft_wrap=True)


class KernelTable:
    """Prints one line a case as it is done: times, rates, fractions of the ceilings, and each rival's time."""

    _HEAD = f"{'case':<34}{'us':>9} {'p20-p80':>17}{'GB/s':>8}{'read':>6}{'TFLOP/s':>9}{'peak':>6}  x rival"

    def __init__(self) -> None:
        self._op = ""

    def add(self, result: CaseResult) -> None:
        """Print one result."""
        if result.op != self._op:
            self._op = result.op
            print(f"\n{result.op}\n{self._HEAD}")
        if result.wrong is not None or result.time is None:
            print(f"{result.case:<34}WRONG, not timed: {result.wrong}", flush=True)
            return
        rivals = ", ".join(f"{result.times_rival(name):.2f} {name}" for name in result.rivals)
        mark = " (in cache)" if result.in_cache else ""
        print(
            f"{result.case:<34}{_us(result.time.p50_us):>9} {_range(result.time):>17}{_number(result.gb_per_s):>8}"
            f"{_percent(result.read_fraction):>6}{_number(result.tflop_per_s):>9}{_percent(result.compute_fraction):>6}"
            f"  {rivals}{mark}",
            flush=True,
        )

    def finish(self, bench: KernelBench) -> None:
        """Print what the columns mean and what could not be measured."""
        threads = bench.environment["threads"]
        print(f"\nisa {bench.isa or 'none'}, {threads} threads, {bench.rounds} interleaved rounds; us: median, p20-p80")
        print("read: of the read bandwidth, peak: of the highest dot-product rate for the inputs' dtypes, both of the")
        print("same rounds; x rival: the rival's time / ours")
        for kind, reason in bench.unavailable.items():
            print(f"{kind}: not measured: {reason}")


def _us(value: float) -> str:
    from llmopt.measure import format as fmt

    return fmt.number(value)


def _range(spread: Spread) -> str:
    return f"{_us(spread.p20_us)}-{_us(spread.p80_us)}"


def _number(value: float | None) -> str:
    from llmopt.measure import format as fmt

    return fmt.number(value) if value else fmt.NONE


def _percent(value: float | None) -> str:
    from llmopt.measure import format as fmt

    return fmt.percent(value, 0)
