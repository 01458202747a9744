"""Several models side by side as data, measured in the same rounds. JSON is the record; table and Markdown are views.

All times are milliseconds, all sizes bytes, all intervals 95% (bootstrap over interleaved rounds).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.measure.report import Ceilings, Gain, Interval, Memory, Quality, Timing, read_record, write_record

SCHEMA_VERSION = 1


@dataclass(slots=True)
class ComparisonRow:
    """One model, as it was given. The first row is what the others are measured against."""

    name: str
    model: dict[str, Any]  # name, model_type, layers, hidden_size, vocab_size, dtype, weights, attention, passes, ...
    timing: Timing
    memory: Memory  # weights only: all models are in one process
    gain: Gain | None = None  # over the first model; None for the first
    request: Interval | None = None  # likewise, of a whole request (settings["request_tokens"] decoded)
    quality: Quality | None = None  # against the first model on held-out text; None: the notes say why
    decode_bytes_per_token: int = 0  # weights and cache
    bandwidth_fraction: float | None = None  # of the measured read bandwidth, from the bytes decode must read
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Comparison:
    """What :func:`llmopt.compare` measured."""

    rows: list[ComparisonRow]
    environment: dict[str, Any]  # measure.environment.capture()
    settings: dict[str, Any]  # prompt, prompt and decode tokens, rounds, seed
    ceilings: Ceilings | None = None
    notes: list[str] = field(default_factory=list)
    measured_s: float = 0.0  # what measuring cost
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values: milliseconds, bytes, ratios, nats a token."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The record as JSON; also written to ``path`` if given."""
        return write_record(self.to_dict(), path)

    @classmethod
    def from_json(cls, source: str | Path) -> Comparison:
        """Read a record back from a path or from JSON text.

        Raises:
            InputError: it is not one.
        """
        comparison: Comparison = read_record(cls, source, name="comparison", version=SCHEMA_VERSION)
        return comparison

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The comparison as GitHub-flavoured Markdown; also written to ``path`` if given."""
        from llmopt.measure import views

        text = views.markdown_comparison(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def print(self) -> None:
        """Print the comparison as tables on stdout."""
        from llmopt.measure import views

        views.print_comparison(self)

    def __str__(self) -> str:
        from llmopt.measure import views

        return views.text_comparison(self)
