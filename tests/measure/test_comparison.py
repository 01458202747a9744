"""A comparison as text and Markdown says what the record holds, in 100 columns, and nothing in it is markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_views import line_with, table_rows

from llmopt.errors import InputError
from llmopt.measure import compared, views
from llmopt.measure.comparison import Comparison
from llmopt.measure.report import Report

LONG = "out/qwen3-0.6b-group128-asymmetric-desc_act-from-another-tool"


def test_every_model_has_its_times_and_ratios_over_the_first(comparison: Comparison) -> None:
    text = str(comparison)
    assert text.splitlines()[0] == "3 models, measured in the same rounds"
    assert line_with(text, "bf16 ").split() == [
        "bf16",
        "812",
        "[796,",
        "828]",
        "62.1",
        "[60.9,",
        "63.3]",
        "16.1",
        "91%",
    ]
    assert line_with(text, "int4 ").split()[-2:] == ["64.9", "83%"]
    ratios = [line.split() for line in text.splitlines() if line.startswith("  x bf16")]
    assert ratios == [
        ["x", "bf16", "3.38x", "[3.31,", "3.45]", "4.02x", "[3.94,", "4.10]"],
        ["x", "bf16", "≈1.002x", "[0.982,", "1.022]", "≈1.001x", "[0.981,", "1.021]"],
    ]


def test_quality_memory_and_whole_requests(comparison: Comparison) -> None:
    text = views.text_comparison(comparison)
    table = text[text.index("whole request") :]
    assert line_with(table, "bf16").split() == ["bf16", "-", "1.19", "GB", "-", "-", "14.4"]
    row = "int4 3.97x [3.89, 4.05] 335 MB, 0.28x 0.0123 97.80% 1.0112x"
    assert " ".join(line_with(table, "int4").split()) == row
    assert " ".join(line_with(table, "other").split()).endswith("2.00 GB, 1.68x - - -")
    unwrapped = " ".join(text.split())
    assert "whole request: 128 tokens in, 128 out; KL, top-1, perplexity: against bf16 on 4096 tokens" in unwrapped
    assert "median [95% interval] of 12 interleaved rounds; prompt: held-out text" in unwrapped


def test_what_each_model_is_and_what_must_be_known(comparison: Comparison) -> None:
    unwrapped = " ".join(str(comparison).split())
    model = "qwen3 · 28 layers of 1024 · vocabulary 151,936"
    assert f"int4: {model} · int4 g128, int8 g128, bfloat16 · attention sdpa · kept quantize_gptq" in unwrapped
    assert "differs from layer model.layers.0 on; largest KL 0.492" in unwrapped
    assert f"other: {model} · float32 · attention sdpa quality was not measured: its tokenizer reads" in unwrapped
    assert "machine: read 17.4 [17.1, 17.7] GB/s" in unwrapped
    assert "note: the machine was busy measuring took 41 s" in unwrapped
    comparison.rows[2].model |= {"random_weights": True, "experts": "grouped_mm"}
    assert "attention sdpa · experts grouped_mm · random weights" in " ".join(str(comparison).split())


@pytest.mark.parametrize("views_of", ["text", "markdown"])
def test_without_quality_nothing_is_said_of_it(views_of: str, comparison: Comparison) -> None:
    for row in comparison.rows:
        row.quality = None
    shown = views.text_comparison(comparison) if views_of == "text" else views.markdown_comparison(comparison)
    assert "held-out text;" not in shown
    assert "against bf16 on" not in shown


def test_text_fits_100_columns_whatever_the_names(comparison: Comparison) -> None:
    for row, name in zip(comparison.rows, (LONG + "-1", LONG + "-2", "[red]b[/red]"), strict=True):
        row.name = name
    comparison.rows[1].request = comparison.rows[2].request
    assert comparison.rows[1].gain is not None
    comparison.rows[1].gain = comparison.rows[2].gain
    text = str(comparison)
    assert max(map(len, text.splitlines())) <= 100
    assert all(line == line.rstrip() for line in text.splitlines())
    # nothing is cut off by the table: it has no ellipsis but that of a name
    names = compared.names(comparison)
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 26
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) == 2
    assert "[1.021" not in text
    assert text.count("1.021]") == 4
    assert LONG + "-1: qwen3" in text.replace("\n    ", " ")


def test_names_that_look_alike_when_short_are_numbered(comparison: Comparison) -> None:
    for i, row in enumerate(comparison.rows):
        row.name = LONG[:30] + f"{i}" + LONG[30:]
    assert [name[-3:] for name in compared.names(comparison)] == [" #1", " #2", " #3"]


def test_markdown_is_one_rectangular_table_without_markup_in_names(comparison: Comparison) -> None:
    comparison.rows[1].name = "a|b <img src=x> *c*"
    markdown = comparison.to_markdown()
    heading, _, *rows = table_rows(markdown)
    assert {len(row) for row in table_rows(markdown)} == {12}
    assert heading[1:5] == ["TTFT ms", "x bf16", "TPOT ms", "x bf16"]
    assert [row[0] for row in rows] == ["bf16", "ab &lt;img src=x> \\*c\\*", "other"]
    assert rows[1][4] == "4.02x [3.94, 4.10]"
    assert "<img" not in markdown
    assert "  - quality was not measured: its tokenizer" in markdown


def test_markdown_is_written_where_asked(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "c.md"
    assert comparison.to_markdown(path) == path.read_text(encoding="utf-8")


def test_print_writes_the_text(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    comparison.print()
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed == str(comparison).splitlines()


def test_one_model_alone(comparison: Comparison) -> None:
    comparison.rows = comparison.rows[:1]
    assert str(comparison).startswith("1 model\n")
    assert "x bf16" not in str(comparison)


def test_json_round_trip(comparison: Comparison) -> None:
    again = Comparison.from_json(comparison.to_json())
    assert again == comparison
    assert str(again) == str(comparison)


def test_other_records_are_refused(comparison: Comparison, full_report: Report) -> None:
    with pytest.raises(
        InputError, match=r"^comparison: expected a record with rows, environment, settings, missing: rows"
    ):
        Comparison.from_json(full_report.to_json())
    with pytest.raises(InputError, match=r"^report: expected a record with model, .* missing: model"):
        Report.from_json(comparison.to_json())
    newer = comparison.to_dict() | {"schema_version": 99}
    with pytest.raises(InputError, match=r"comparison schema_version: expected 1, got 99"):
        Comparison.from_json(json.dumps(newer))
    with pytest.raises(InputError, match="comparison: not JSON"):
        Comparison.from_json("{")
