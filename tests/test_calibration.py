"""Calibration data: everything a caller may bring, as equally long rows of token ids."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from llmopt.errors import CalibrationError
from llmopt.passes.quantize_gptq import calibrate

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture(scope="module")
def model() -> Any:
    """Just enough of a model: its vocabulary, and where its tokenizer lies."""

    class Config:
        vocab_size = 4096
        _name_or_path = str(ASSETS / "tiny-qwen3")

        def get_text_config(self) -> Config:
            return self

    class Model:
        config = Config()

    return Model()


@pytest.fixture
def without_tokenizer(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(type(model.config), "_name_or_path", "", raising=False)
    return model


def rows(source: Any, model: Any, **settings: Any) -> torch.Tensor:
    found = calibrate.rows(source, model, **settings)
    assert all(r.dtype == torch.int64 and r.dim() == 1 for r in found)
    return torch.stack(found)


IDS = torch.arange(3, 1003)


@pytest.mark.parametrize(
    "source",
    [
        IDS,
        IDS.to(torch.int32),
        IDS.view(10, 100),
        IDS.tolist(),
        tuple(IDS.tolist()),
        list(IDS.view(10, 100)),
        IDS.view(10, 100).tolist(),
        IDS.numpy(),
        IDS.view(10, 100).numpy(),
        list(IDS.numpy()),
        [{"input_ids": row} for row in IDS.view(10, 100)],
        [{"input_ids": row.tolist(), "attention_mask": [1] * 100} for row in IDS.view(10, 100)],
        {"input_ids": IDS.view(10, 100)},
        {"input_ids": IDS.view(10, 100).tolist()},
        [IDS[:7].tolist(), IDS[7:500], IDS[500:].numpy()],
        [IDS, []],
        range(3, 1003),
    ],
    ids=[
        "tensor", "int32", "tensor_2d", "ints", "tuple", "tensors", "lists", "numpy", "numpy_2d", "numpy_ints",
        "mappings", "mappings_of_lists", "mapping", "mapping_of_lists", "mixed", "with_empty", "range",
    ],
)  # fmt: skip
def test_token_ids_in_every_form_give_the_same_rows(source: Any, without_tokenizer: Any) -> None:
    assert torch.equal(rows(source, without_tokenizer, row_tokens=50), IDS.view(20, 50))


@pytest.mark.parametrize(
    "source",
    [(r for r in IDS.view(10, 100)), iter(IDS.tolist()), ({"input_ids": r.tolist()} for r in IDS.view(10, 100))],
    ids=["tensors", "ints", "mappings"],
)
def test_iterators_are_read(source: Any, without_tokenizer: Any) -> None:
    assert torch.equal(rows(source, without_tokenizer, row_tokens=50), IDS.view(20, 50))


def test_an_endless_iterator_is_not_read_to_its_end(model: Any) -> None:
    def endless() -> Iterator[str]:
        for i in itertools.count():
            assert i < 100_000
            yield f"sentence number {i} of a stream that never ends"

    found = rows(endless(), model, num_rows=4, row_tokens=32)
    assert found.shape == (4, 32)


TEXT = "A first paragraph about spreadsheets.\n\nAnd a second one, about printing. " * 20


def test_text_is_read_with_the_models_own_tokenizer(model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-qwen3")
    expected = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    found = rows(TEXT, model, row_tokens=20)
    assert torch.equal(found.flatten(), expected[: found.numel()])
    for other in ([TEXT], (t for t in [TEXT]), {"text": TEXT}, [{"text": TEXT}], {"text": [TEXT]}):
        assert torch.equal(rows(other, model, row_tokens=20), found)


def test_empty_lines_of_a_data_set_are_passed_over(model: Any) -> None:
    expected = rows([TEXT, TEXT], model, row_tokens=20)
    assert torch.equal(rows(["", TEXT, "  \n", {"text": ""}, TEXT, ""], model, row_tokens=20), expected)


def test_the_tokenizer_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find, calls = calibrate.find_tokenizer, []

    def counting(found: Any) -> Any:
        calls.append(1)
        return find(found)

    monkeypatch.setattr(calibrate, "find_tokenizer", counting)
    rows([TEXT] * 10, model, row_tokens=20)
    rows(IDS, model)
    assert len(calls) == 1


def test_long_text_brings_no_warning(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows(None, model)
    assert caplog.text == ""


def test_rows_are_taken_evenly_over_what_there_is(without_tokenizer: Any) -> None:
    found = rows(torch.arange(4000), without_tokenizer, num_rows=5, row_tokens=100)
    assert found.shape == (5, 100)
    assert found[0, 0] == 0
    assert found[-1, -1] == 3999
    gaps = found[1:, 0] - found[:-1, 0]
    assert gaps.max() - gaps.min() <= 100


def test_short_data_is_one_short_row(without_tokenizer: Any) -> None:
    assert rows([5, 6, 7], without_tokenizer).tolist() == [[5, 6, 7]]
    assert rows([5, 6], without_tokenizer).tolist() == [[5, 6]]


def test_the_rest_that_fills_no_row_is_left_out(without_tokenizer: Any) -> None:
    assert rows(IDS, without_tokenizer, row_tokens=300).shape == (3, 300)


def test_the_default_is_the_packaged_text(model: Any) -> None:
    found = rows(None, model)
    assert found.shape == (calibrate.NUM_ROWS, calibrate.ROW_TOKENS)
    assert torch.equal(found, rows(calibrate.packaged_text("calibration"), model))
    assert torch.equal(found, rows(None, model))


def test_the_parts_of_the_packaged_text_do_not_overlap() -> None:
    calibration, held_out = (calibrate.packaged_text(part) for part in ("calibration", "quality"))
    assert 3 < len(calibration) / len(held_out) < 5

    def paragraphs(text: str) -> set[str]:
        return {p.strip() for p in text.split("\n\n") if len(p) > 80}

    assert not paragraphs(calibration) & paragraphs(held_out)
    for text in (calibration, held_out):
        assert sum(0x4E00 <= ord(c) < 0xA000 for c in text) > 1000  # Chinese
        assert sum(c.isascii() and c.isalpha() for c in text) > 10_000


def test_the_packaged_text_is_not_the_held_out_text_of_the_bundled_models() -> None:
    held_out = {line for line in (ASSETS / "heldout.txt").read_text(encoding="utf-8").splitlines() if len(line) > 60}
    packaged = "".join(calibrate.packaged_text(part) for part in ("calibration", "quality"))
    assert held_out
    assert not [line for line in held_out if line in packaged]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "at least 2 tokens, got 0"),
        ("", "at least 2 tokens, got 0"),
        (" \n\t", "at least 2 tokens, got 0"),
        (["", ""], "at least 2 tokens, got 0"),
        ([9], "at least 2 tokens, got 1"),
        (torch.zeros(0, dtype=torch.long), "got 0"),
        (torch.zeros(3, 0, dtype=torch.long), "got 0"),
        (torch.full((4, 8), 0.5), "integer token ids, got torch.float32"),
        ([[0.5, 1.5]], "integer token ids, got torch.float32"),
        (np.array([0.5, 1.5]), "integer token ids, got torch.float64"),
        ([True, False], "integer token ids"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"shape \[T\] or \[N, T\], got \[2, 3, 4\]"),
        (torch.tensor(7), r"shape \[T\] or \[N, T\], got \[\]"),
        ([5, 4096], r"in \[0, 4096\), got 5 to 4096"),
        ([5, -1], r"in \[0, 4096\), got -1 to 5"),
        ([2**70, 3], "cannot read"),
        (7, "got int"),
        (b"some bytes", "got bytes"),
        (object(), "got object"),
        (Path("text.txt"), "got PosixPath"),
        ([object()], "cannot read an item of type object"),
        ([None], "cannot read an item of type NoneType"),
        ([[[1, 2], [3]]], "cannot read an item of type list"),
        ({"tokens": [1, 2]}, "'input_ids' or 'text', got keys"),
        ([{1: 2, "a": 3}], "'input_ids' or 'text', got keys"),
        ({"text": None}, "got NoneType"),
    ],
    ids=lambda v: str(v).replace(" ", "").partition("0x")[0][:30],
)
def test_what_cannot_be_used_is_named(source: Any, says: str, model: Any) -> None:
    with pytest.raises(CalibrationError, match=says) as caught:
        calibrate.rows(source, model)
    assert str(caught.value).startswith("calibration: ")


def test_text_without_a_tokenizer_says_where_it_was_looked_for(without_tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"there is no tokenizer\.json in ''"):
        calibrate.rows(TEXT, without_tokenizer)
    assert calibrate.find_tokenizer(without_tokenizer) is None


def test_a_tokenizer_that_is_given_is_used(without_tokenizer: Any) -> None:
    reader = AutoTokenizer.from_pretrained(ASSETS / "tiny-qwen3")
    found = rows(TEXT, without_tokenizer, tokenizer=reader).flatten()
    assert found.tolist() == reader(TEXT, add_special_tokens=False)["input_ids"][: len(found)]


def test_a_tokenizer_in_the_hubs_cache_is_found(tmp_path: Path) -> None:
    """As ``from_pretrained`` of a hub's name leaves it, in a process of its own: the cache's place is read once."""
    held = tmp_path / "hub" / "models--some--model"
    shutil.copytree(
        ASSETS / "tiny-qwen3", held / "snapshots" / ("0" * 8), ignore=shutil.ignore_patterns("*.safetensors")
    )
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("0" * 8)
    code = """
import sys, types
from llmopt.passes.quantize_gptq import calibrate
for name in ("some/model", "some/other"):
    found = calibrate.find_tokenizer(types.SimpleNamespace(config=types.SimpleNamespace(_name_or_path=name)))
    print(None if found is None else len(found("table")["input_ids"]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, other = ran.stdout.split()
    assert int(first) >= 1
    assert other == "None"


def test_a_tokenizer_that_cannot_be_read_is_named(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    monkeypatch.setattr(type(model.config), "_name_or_path", str(tmp_path))
    with pytest.raises(CalibrationError, match="the tokenizer cannot be read"):
        calibrate.rows(TEXT, model)


@pytest.mark.parametrize("length", [1, 0, -3])
def test_rows_of_one_token_are_refused(length: int, model: Any) -> None:
    with pytest.raises(CalibrationError, match=r"^row_tokens: expected at least 2"):
        calibrate.rows(IDS, model, row_tokens=length)
