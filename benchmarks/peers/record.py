"""The record of a run as data: every sample, and what follows from them. JSON is the record; tables are views."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.measure import stats
from llmopt.measure.report import Interval

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One contender of the record."""

    name: str
    label: str
    is_peer: bool
    info: dict[str, Any]  # what its worker said of itself: versions, settings, weights by role


@dataclass(slots=True)
class Record:
    """One run. Samples and medians are tokens a second of all sequences together."""

    shape: str
    command: str
    settings: dict[str, Any]  # threads, rounds, cap, jobs
    environment: dict[str, Any]  # measure.environment.capture()
    cells: list[str]
    rows: list[Row]
    samples: dict[str, dict[str, list[float]]]
    skipped: dict[str, dict[str, str]]
    ceilings: dict[str, list[float]] = field(default_factory=dict)  # kind -> one value a round
    schema_version: int = SCHEMA_VERSION

    def complete(self, name: str, cell: str) -> list[float] | None:
        """The samples of a cell, one of every round; None where it was skipped, or stopped half-way."""
        if cell in self.skipped.get(name, {}):
            return None
        return self.samples.get(name, {}).get(cell)

    def rate(self, name: str, cell: str) -> Interval | None:
        samples = self.complete(name, cell)
        return stats.interval(samples) if samples else None

    def over(self, name: str, other: str, cell: str) -> Interval | None:
        """Rate of ``name`` over that of ``other``, by round: above 1, ``name`` is faster."""
        mine, theirs = self.complete(name, cell), self.complete(other, cell)
        return stats.ratio(mine, theirs) if mine and theirs else None

    def read_share(self, name: str, cell: str) -> Interval | None:
        """Share of the read bandwidth, the median of a round's, at which a contender that says what it ``reads`` decodes."""
        reads = next((row.info.get("reads") for row in self.rows if row.name == name), None)
        rates, ceilings = self.complete(name, cell), self.ceilings.get("read_gb_per_s")
        found = re.fullmatch(r"decode (\d+)", cell)
        if not (reads and rates and ceilings and found):
            return None
        size = reads["weights"] + reads["cache"] * (int(found[1]) + self.settings["tokens"] / 2)
        each = len(ceilings) // len(rates)
        rounds = [statistics.median(ceilings[i * each : (i + 1) * each]) for i in range(len(rates))]
        return stats.interval([size * rate / (gb * 1e9) for rate, gb in zip(rates, rounds, strict=True)])

    def best_peer(self, cell: str) -> str | None:
        """The peer with the highest median."""
        rates = {row.name: self.rate(row.name, cell) for row in self.rows if row.is_peer}
        medians = {name: rate.value for name, rate in rates.items() if rate is not None}
        return max(medians, key=medians.__getitem__, default=None)

    def label(self, name: str) -> str:
        return next(row.label for row in self.rows if row.name == name)

    def to_json(self, path: Path) -> None:
        """Write the record, with the medians and ratios that follow from it."""
        data = dataclasses.asdict(self) | {"derived": self.derived()}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def derived(self, ours: str = "llmopt") -> dict[str, Any]:
        """Median rates, and the ratio of ours to everyone else's, for readers of the JSON."""
        out: dict[str, Any] = {"tokens_per_s": {}, f"{ours}_over": {}, "best_peer": {}}
        for cell in self.cells:
            out["best_peer"][cell] = self.best_peer(cell)
            for row in self.rows:
                for key, value in (("tokens_per_s", self.rate(row.name, cell)),
                                   (f"{ours}_over", self.over(ours, row.name, cell))):  # fmt: skip
                    if value is not None and (key == "tokens_per_s" or row.name != ours):
                        out[key].setdefault(row.name, {})[cell] = dataclasses.asdict(value)
        return out

    @classmethod
    def from_json(cls, path: Path) -> Record:
        """Read a record back.

        Raises:
            ValueError: it is of another version.
        """
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path.name}: expected version {SCHEMA_VERSION}, got {data.get('schema_version')}")
        data.pop("derived", None)
        rows = [Row(**row) for row in data.pop("rows")]
        return cls(rows=rows, **data)


def bits_per_weight(rows: list[Mapping[str, Any]], *roles: str) -> float | None:
    """Stored bits per weight of some roles together, scales included; None where there are none."""
    chosen = [row for row in rows if row["role"] in roles]
    weights = sum(row["weights"] for row in chosen)
    return 8 * sum(row["bytes"] for row in chosen) / weights if weights else None
