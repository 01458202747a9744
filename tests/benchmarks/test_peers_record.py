"""What the table of the peer benchmark says follows from the samples, and nothing is left out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.peers import tables
from benchmarks.peers.contenders import EAGER, FIELD, OURS
from benchmarks.peers.record import Record, Row, bits_per_weight

CELLS = ["prefill 128", "decode 128"]
SAMPLES = {
    OURS: {"prefill 128": [500.0, 520.0, 510.0], "decode 128": [60.0, 66.0, 63.0]},
    "llama-cpp-q4_0": {"prefill 128": [250.0, 260.0, 255.0], "decode 128": [40.0, 44.0, 42.0]},
    "openvino-int4": {"prefill 128": [400.0, 416.0, 408.0], "decode 128": [30.0, 33.0]},
    EAGER: {"prefill 128": [100.0, 104.0, 102.0], "decode 128": [10.0, 11.0, 10.5]},
}
SKIPPED = {
    "openvino-int4": {"decode 128": "RuntimeError: it broke in round 3"},
    "torchao-int4": dict.fromkeys(CELLS, "pip found no such version"),
}


@pytest.fixture
def record() -> Record:
    names = [OURS, "llama-cpp-q4_0", "openvino-int4", "torchao-int4", EAGER]
    environment: dict[str, Any] = {
        "cpu": {"model": "A processor"}, "versions": {"torch": "2", "transformers": "5", "llmopt": "0"},
        "git": {"commit": "abcdef0123"}, "date": "2026-11-24T00:00:00Z",
    }  # fmt: skip
    return Record(
        shape="qwen3-0.6b", command="python -m benchmarks.peers", settings={"threads": 2, "rounds": 3},
        environment=environment, cells=CELLS,
        rows=[Row(n, FIELD[n].label, FIELD[n].is_peer, {"versions": {"x": "1|2"}}) for n in names],
        samples={name: {cell: list(values) for cell, values in cells.items()} for name, cells in SAMPLES.items()},
        skipped=SKIPPED, ceilings={"read_gb_per_s": [30.0, 31.0, 32.0]},
    )  # fmt: skip


def test_ratios_are_paired_by_round(record: Record) -> None:
    ratio = record.over(OURS, "llama-cpp-q4_0", "decode 128")
    assert ratio is not None
    # the machine drifted by a tenth, the ratio did not
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    rate = record.rate(OURS, "decode 128")
    assert rate is not None
    assert (rate.value, rate.low, rate.high) == (63.0, 60.0, 66.0)


def test_the_share_of_the_bandwidth_is_paired_by_round(record: Record) -> None:
    assert record.read_share(OURS, "decode 128") is None
    record.rows[0].info["reads"] = {"weights": 400_000_000, "cache": 1000}
    record.settings["tokens"] = 32
    share = record.read_share(OURS, "decode 128")
    assert share is not None
    assert share.value == pytest.approx(63 * 400_144_000 / 31e9, rel=0.03)
    # several of a round: their median
    record.ceilings["read_gb_per_s"] = [30.0, 29.0, 99.0, 31.0, 30.0, 99.0, 32.0, 31.0, 99.0]
    assert record.read_share(OURS, "decode 128") == share
    assert record.read_share(OURS, "prefill 128") is None
    assert "of the read bandwidth" in tables.markdown(record)


def test_the_best_peer_is_no_baseline_and_has_finished(record: Record) -> None:
    assert record.best_peer("prefill 128") == "openvino-int4"
    assert record.best_peer("decode 128") == "llama-cpp-q4_0"
    record.samples = {OURS: record.samples[OURS], EAGER: record.samples[EAGER]}
    assert record.best_peer("prefill 128") is None


def test_a_cell_that_stopped_half_way_has_no_figure(record: Record) -> None:
    assert record.rate("openvino-int4", "decode 128") is None
    assert record.over(OURS, "openvino-int4", "decode 128") is None
    assert record.rate("openvino-int4", "prefill 128") is not None


def test_the_record_comes_back_from_json(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.to_json(path)
    assert Record.from_json(path) == record
    text = path.read_text()
    assert '"best_peer"' in text
    path.write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(ValueError, match="expected version 1, got 99"):
        Record.from_json(path)


def test_the_derived_ratios_are_in_the_json(record: Record) -> None:
    derived = record.derived()
    assert derived["best_peer"] == {"prefill 128": "openvino-int4", "decode 128": "llama-cpp-q4_0"}
    assert derived["llmopt_over"]["eager"]["decode 128"]["value"] == pytest.approx(6.0)
    assert OURS not in derived["llmopt_over"]
    assert derived["tokens_per_s"][OURS]["decode 128"]["value"] == 63.0


def test_markdown_shows_every_row_figure_and_reason(record: Record) -> None:
    text = tables.markdown(record)
    lines = text.splitlines()
    ours = next(line for line in lines if line.startswith("| llmopt |"))
    assert ours == "| llmopt | 510<br>[500, 520] | 63.0<br>[60.0, 66.0] |"
    assert next(line for line in lines if line.startswith("| OpenVINO")) == (
        "| OpenVINO int4 | 408<br>[400, 416] | (1) |"
    )
    assert next(line for line in lines if line.startswith("| torchao")).endswith("| (2) | (2) |")
    best = next(line for line in lines if line.startswith("| **llmopt over the best peer**"))
    assert "1.25x<br>[1.25, 1.25]<br>OpenVINO int4" in best
    assert "1.50x<br>[1.50, 1.50]<br>llama.cpp Q4_0" in best
    assert "6.00x" in next(line for line in lines if line.startswith("| **llmopt over eager"))
    assert "- (1) RuntimeError: it broke in round 3" in lines
    assert "- (2) pip found no such version" in lines
    assert "read 31.0 [30.0, 32.0] GB/s" in text
    widths = {line.count("|") for line in lines if line.startswith("| ") and "<br>" in line}
    assert widths == {4}
    assert "1/2" in text, "a bar in a value would break the table"


def test_the_terminal_shows_the_same(record: Record) -> None:
    console = Console(width=160, record=True, quiet=False)
    with console.capture() as captured:
        tables.print_table(record, console)
    text = captured.get()
    for wanted in ("63.0", "[60.0, 66.0]", "1.50x", "llama.cpp Q4_0", "(2) pip found no such version", "31.0"):
        assert wanted in text


def test_a_record_without_us_still_prints(record: Record) -> None:
    record.rows = [row for row in record.rows if row.name != OURS]
    assert "over the best peer" not in tables.markdown(record)


def test_bits_per_weight_count_scales() -> None:
    rows = [
        {"role": "linear", "format": "i4", "weights": 128, "bytes": 64},
        {"role": "linear", "format": "scales", "weights": 0, "bytes": 2},
        {"role": "head", "format": "i8", "weights": 128, "bytes": 130},
    ]
    assert bits_per_weight(rows, "linear") == 4.125
    assert bits_per_weight(rows, "head") == 8.125
    assert bits_per_weight(rows, "experts") is None
