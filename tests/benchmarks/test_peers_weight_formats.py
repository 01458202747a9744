"""The table of weight formats counts what the workers say, and takes its place in the document."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import weight_formats
from benchmarks.peers.workers import serve
from llmopt.models.published import SHAPES

TIED = serve.weight_rows([("linear", "Q4_0", 320, 180), ("head", "Q6_K", 256, 210), ("other", "F32", 8, 32)])
UNTIED = serve.weight_rows(
    [
        ("linear", "int4", 100, 50),
        ("experts", "int4", 1000, 500),
        ("head", "int4", 100, 50),
        ("embedding", "bf16", 100, 200),
    ]
)


def test_an_embedding_of_its_own_is_not_read_for_a_token() -> None:
    assert weight_formats.bytes_per_token(TIED, {}) == 180 + 210 + 32


@pytest.mark.parametrize("shape", ["qwen3-30b-a3b", "ernie-4.5-21b-a3b", "deepseek-v2-lite"])
def test_of_the_experts_only_the_chosen_are_read(shape: str) -> None:
    share = {"qwen3-30b-a3b": 8 / 128, "ernie-4.5-21b-a3b": 6 / 64, "deepseek-v2-lite": 6 / 64}[shape]
    assert weight_formats.bytes_per_token(UNTIED, SHAPES[shape].config) == 50 + 50 + 500 * share


def test_the_table_shows_bits_with_scales_and_says_where_the_embedding_is() -> None:
    lines = weight_formats.table({"llama-cpp-q4_0": TIED}, "qwen3-0.6b").splitlines()
    assert lines[2] == "| llama.cpp Q4_0 | 4.500 (Q4_0) | 6.562 (Q6_K) | the head's | 422 B | 422 B |"


def test_the_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    document = tmp_path / "formats.md"
    document.write_text(f"before\n{weight_formats.BEGIN}\nold\n{weight_formats.END}\nafter\n")
    for text in ("first", "second"):
        weight_formats.put(document, text)
    assert document.read_text() == (f"before\n{weight_formats.BEGIN}\n\nsecond\n\n{weight_formats.END}\nafter\n")
    document.write_text("no markers")
    with pytest.raises(ValueError, match="expected <!-- formats: begin"):
        weight_formats.put(document, "x")


def test_the_document_has_its_markers() -> None:
    document = (Path(__file__).parents[2] / "docs" / "weight-formats.md").read_text(encoding="utf-8")
    assert weight_formats.BEGIN in document
    assert weight_formats.END in document
