"""The picture draws every kind of receipt, and its words stay inside the frame and apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmopt.errors import MissingDependencyError
from llmopt.measure import plot
from llmopt.measure.report import Report


@pytest.mark.parametrize("name", ["full_report", "unmeasured_report", "empty_report"])
def test_draws_a_png(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = request.getfixturevalue(name).plot(tmp_path / "report.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", ["full_report", "unmeasured_report"])
def test_labels_stay_inside_their_panel(name: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("matplotlib")
    figure = plot.make_figure(request.getfixturevalue(name))
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    checked = 0
    for axes in figure.axes:
        panel = axes.get_window_extent(renderer)
        for label in axes.texts:
            if label.get_text().strip():
                assert label.get_window_extent(renderer).x1 <= panel.x1 + 1
                checked += 1
    assert checked >= len(figure.axes)
    for words in figure.texts:
        assert words.get_window_extent(renderer).x1 <= figure.bbox.x1


def test_says_the_gain_and_marks_the_undone_pass(full_report: Report) -> None:
    pytest.importorskip("matplotlib")
    figure = plot.make_figure(full_report)
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "Qwen3-0.6B: 4.02x decode, 3.38x first token, 0.28x weights"
    assert "compile_tvm not applicable: apache-tvm is not installed" in words[2].replace("\n", " ")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["eager", "stock (sdpa, grouped_mm)", "quantize_gptq", "fuse_kernels\nundone"]
    decode = [label.get_text().split() for label in figure.axes[0].texts]
    assert decode == [["16.1"], ["16.3", "≈1.01x"], ["64.9", "4.02x"], ["71.1", "4.41x"]]


def test_without_matplotlib_names_the_extra(
    full_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install llmopt\[plot\]"):
        full_report.plot(tmp_path / "report.png")
