"""The receipt as text and Markdown says what the record holds, in 100 columns, and nothing in it is markup."""

from __future__ import annotations

import pytest

from llmopt.measure import format as fmt
from llmopt.measure import views
from llmopt.measure.report import Interval, Report, Timing

ALL_REPORTS = ("full_report", "unmeasured_report", "empty_report")


def table_rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")] for line in lines]


def line_with(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


@pytest.mark.parametrize("name", ALL_REPORTS)
def test_text_fits_100_columns_without_trailing_space(name: str, request: pytest.FixtureRequest) -> None:
    lines = views.text(request.getfixturevalue(name)).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)


def test_headline_comes_first_and_counts_only_what_stayed(full_report: Report) -> None:
    text = views.text(full_report)
    assert text.splitlines()[0] == "Qwen3-0.6B · qwen3 · 596 M parameters · bfloat16 · 1.19 GB"
    # 64.9 tok/s is the kept pass's rate; the undone one reached 71.1
    decode = " ".join(line_with(text, "decode").split())
    assert decode == "decode 16.1 → 64.9 tok/s 4.02x [3.94, 4.10] over eager"
    assert "KL 0.0123 nats/token, top-1 97.8%, perplexity 1.0112x" in line_with(text, "quality")
    assert line_with(text, "kept").split() == ["kept", "quantize_gptq"]
    assert line_with(text, "undone").split() == ["undone", "fuse_kernels"]
    assert text.index("decode ") < text.index("stage") < text.index("machine:")


def test_time_table_has_eager_stock_and_each_timed_pass(full_report: Report) -> None:
    text = views.text(full_report)
    assert line_with(text, "eager").split()[:3] == ["eager", "812", "[796,"]
    assert "760 [745, 775]" in line_with(text, "stock (sdpa, grouped_mm)")
    assert "83%" in line_with(text, "quantize_gptq  ")
    assert "14.1 [13.8, 14.3]" in line_with(text, "fuse_kernels (undone)")
    assert "compile_tvm  " not in text
    assert "compile_tvm: not applicable" in text
    assert "3.20x [3.14, 3.26]" in line_with(text, "x all but this")


def test_cost_table_reasons_coverage_and_notes(full_report: Report) -> None:
    text = views.text(full_report)
    costs = text[text.index("KL nats/tok") :]
    row = line_with(costs, "quantize_gptq").split()
    assert row == ["quantize_gptq", "335", "MB", "820", "MB", "0.0123", "97.80%", "1.0112x", "184", "3,940"]
    assert "197 modules, 99.8% of the weight bytes: 1.19 GB → 335 MB (28.1%)" in text
    unwrapped = " ".join(text.split())
    assert "model.layers.2.mlp.gate and 2 more: router stays in bfloat16" in unwrapped
    assert "note: baseline scaled from 6 of 48 layers" in text
    assert "read 17.4 [17.1, 17.7] GB/s, int8 0.620 [0.608, 0.632] TOP/s; 2 threads" in text
    assert "bf16" not in text.split("machine:")[1].splitlines()[0]


def test_unmeasured_and_random_weights_are_said_not_made_up(unmeasured_report: Report) -> None:
    text = views.text(unmeasured_report)
    assert line_with(text, "speed").split() == ["speed", "not", "measured"]
    assert "random weights: no quality figures" in text
    assert "TPOT" not in text
    assert "1.19 GB → 335 MB   0.28x" in text


def test_no_pass_kept_is_said(full_report: Report) -> None:
    full_report.passes = full_report.passes[1:]
    assert "as before: no pass was kept" in views.text(full_report)
    assert line_with(views.text(full_report), "kept").split() == ["kept", "none"]


def test_non_finite_modules_are_named(full_report: Report) -> None:
    kept = full_report.passes[0]
    assert kept.quality is not None
    kept.quality.non_finite = ["model.layers.3.mlp"]
    assert line_with(views.text(full_report), "NaN or Inf").split()[-1] == "model.layers.3.mlp"


def test_a_path_is_shown_by_its_last_part(full_report: Report) -> None:
    full_report.model["name"] = "/home/someone/models/tiny-qwen3"
    assert views.text(full_report).startswith("tiny-qwen3 · qwen3")
    full_report.model["name"] = "Qwen/Qwen3-0.6B"
    assert views.text(full_report).startswith("Qwen/Qwen3-0.6B · qwen3")


def test_peak_memory_says_how_it_was_measured(full_report: Report) -> None:
    assert full_report.baseline_memory is not None
    full_report.baseline_memory.peak_rss_how = "a process of its own"
    for view in (views.text(full_report), views.markdown(full_report)):
        assert "peak RSS: a process of its own" in view


def test_markdown_tables_are_rectangular_and_have_one_row_a_stage(full_report: Report) -> None:
    rows = table_rows(views.markdown(full_report))
    times, costs = [r for r in rows if len(r) == 11], [r for r in rows if len(r) == 9]
    assert len(times) + len(costs) == len(rows)
    assert [r[0] for r in times[2:]] == ["eager", "stock (sdpa, grouped_mm)", "quantize_gptq", "fuse_kernels"]
    assert [r[1] for r in times[2:]] == ["baseline", "baseline", "kept", "undone"]
    assert [r[0] for r in costs[2:]] == ["eager", "quantize_gptq", "fuse_kernels"]


def test_markdown_drops_the_leave_one_out_column_when_it_was_not_measured(full_report: Report) -> None:
    full_report.passes[0].leave_one_out = None
    assert "all but this" not in views.markdown(full_report)
    assert {len(r) for r in table_rows(views.markdown(full_report))} == {10, 9}


def test_names_from_a_checkpoint_are_not_markup(full_report: Report) -> None:
    full_report.model["name"] = "[red]a|b[/red] <img src=x> *c*"
    full_report.passes[0].coverage["skipped"] = {"[bold]m[/bold]": "why [not]"}
    text = views.text(full_report)
    assert text.startswith("[red]a|b[/red] <img src=x> *c*")
    assert "[bold]m[/bold]: why [not]" in text
    markdown = views.markdown(full_report)
    assert "<img" not in markdown
    assert "a\\|b" in markdown


def test_json_round_trip_gives_the_same_views(full_report: Report) -> None:
    again = Report.from_json(full_report.to_json())
    assert again == full_report
    assert views.text(again) == views.text(full_report) == str(full_report)


def test_compare_numbers_equal_names_and_shows_the_final_stage(full_report: Report) -> None:
    text = views.text_compare([full_report, full_report])
    assert max(map(len, text.splitlines())) <= 100
    assert line_with(text, "Qwen3-0.6B #2").split()[2:5] == ["64.9", "4.02x", "[3.94,"]
    assert "not comparable" not in text
    assert "Qwen3-0.6B #1: kept quantize_gptq" in text


def test_compare_says_what_makes_reports_incomparable(full_report: Report) -> None:
    other = Report.from_json(full_report.to_json())
    other.environment["cpu"]["model"] = "Another"
    other.environment["date"] = "2026-02-01T12:00:00Z"
    assert isinstance(other.baseline, Timing)
    other.baseline.prompt_tokens = 4096
    markdown = views.markdown_compare([full_report, other])
    assert "not comparable: different machines and prompt, decode length or batch" in markdown
    assert "measured at different times, not in the same rounds" in markdown
    assert {len(r) for r in table_rows(markdown)} == {7}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Interval(3.874, 3.7, 4.02, 9), "3.87x [3.70, 4.02]"),
        (Interval(1.004, 0.998, 1.009, 9), "≈1.004x [0.998, 1.009]"),
        (Interval(0.953, 0.941, 0.962, 9), "0.953x [0.941, 0.962]"),
        (Interval(12.34, 12.0, 12.9, 9), "12.3x [12.0, 12.9]"),
        (Interval(1.082, 0.232, 3.286, 9), "≈1.08x [0.23, 3.29]"),
        (None, "-"),
    ],
    ids=["faster", "no_difference", "slower", "tenfold", "noisy", "absent"],
)
def test_ratio_format(value: Interval | None, expected: str) -> None:
    assert fmt.ratio(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(812.34, "812"), (62.08, "62.1"), (0.01234, "0.0123"), (4.5e-6, "4.5e-06"), (12345, "12345"), (0, "0"),
     (None, "-"), (float("nan"), "nan"), (float("inf"), "inf")],
    ids=["hundreds", "tens", "small", "tiny", "large", "zero", "none", "nan", "inf"],
)  # fmt: skip
def test_number_format(value: float | None, expected: str) -> None:
    assert fmt.number(value) == expected
