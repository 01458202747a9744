"""What llmopt knows of a model it has loaded, and of copies: receipt, passes, and that nothing of them is undone."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native
from llmopt.checkpoint import recorded_passes, recorded_report
from llmopt.cli_models import open_model
from llmopt.errors import CheckpointError, InputError, ModelStateError
from llmopt.model_state import active_passes
from llmopt.passes import FuseKernels, QuantizeGptq

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

PASSES = [QuantizeGptq(group_size=64), FuseKernels(prompt_lookup=4)]
NAMES = ["quantize_gptq", "fuse_kernels"]


@pytest.fixture
def saved(tiny: Any, token_rows: Any, tmp_path: Path) -> Path:
    model = llmopt.optimize(tiny("qwen3"), PASSES, calibration=token_rows(4, 48), measure=False, strict=True)
    return llmopt.save(model, tmp_path / "saved")


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(ids).logits
    return out


def rewrite(directory: Path, passes: dict[str, Any]) -> None:
    path = directory / "llmopt.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["passes"] = passes
    path.write_text(json.dumps(record), encoding="utf-8")


def test_passes_and_receipt_survive_any_number_of_turns(saved: Path, tmp_path: Path, token_rows: Any) -> None:
    ids, first = token_rows(2, 12), llmopt.load(saved)
    assert list(active_passes(first)) == NAMES
    again = llmopt.save(first, tmp_path / "again")
    assert recorded_passes(again) == recorded_passes(saved)
    assert recorded_passes(again)["fuse_kernels"]["prompt_lookup"] == 4
    second = llmopt.load(again)
    assert list(active_passes(second)) == NAMES
    assert torch.equal(logits(second, ids), logits(first, ids))
    third = recorded_report(llmopt.save(second, tmp_path / "third"))
    assert third == recorded_report(again)
    assert third is not None
    assert [note.startswith("loaded:") for note in third["notes"]].count(True) == 1


def test_the_receipt_is_the_saved_one_and_its_details_are_of_this_process(saved: Path) -> None:
    model = llmopt.load(saved)
    report, record = llmopt.report(model), recorded_report(saved)
    assert record is not None
    assert report.environment == record["environment"]
    assert [row.name for row in report.kept()] == NAMES
    assert llmopt.report(model) is report
    prompt = torch.arange(4).repeat(8)[None]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert report.passes[1].details["prompt_lookup"]["guesses"] > 0


def test_a_checkpoint_without_a_receipt_has_none(tiny: Any, tmp_path: Path) -> None:
    model = llmopt.load(llmopt.save(tiny("qwen3"), tmp_path / "plain"), passes=["fuse_kernels"])
    with pytest.raises(InputError, match="without a receipt"):
        llmopt.report(model)
    assert list(recorded_passes(llmopt.save(model, tmp_path / "out"))) == ["fuse_kernels"]


def test_what_load_applied_is_not_undone_and_no_baseline(saved: Path) -> None:
    model = llmopt.load(saved)
    with pytest.raises(InputError, match=r"not optimized.*loaded.*passes=None"):
        llmopt.restore(model)
    with pytest.raises(ModelStateError, match=r"fuse_kernels applied already.*loaded"):
        llmopt.optimize(model, measure=False)
    with pytest.raises(ModelStateError, match=r"fuse_kernels applied already.*loaded"):
        llmopt.optimize(copy.deepcopy(model), measure=False)
    assert list(active_passes(model)) == NAMES


def test_a_loaded_model_without_passes_is_optimized_anew(
    tiny: Any, tmp_path: Path, token_rows: Any, snapshot: Any, same_bits: Any
) -> None:
    given = llmopt.optimize(tiny("qwen3"), ["fuse_kernels"], measure=False, strict=True)
    saved = llmopt.save(given, tmp_path / "saved")
    model, ids = llmopt.load(saved, passes=None), token_rows(2, 12)
    before, expected = snapshot(model), logits(model, ids)
    assert active_passes(model) == {}
    llmopt.optimize(model, [FuseKernels(kv_dtype="int8")], measure=False, strict=True)
    assert llmopt.report(model).passes[0].options["kv_dtype"] == "int8"
    assert recorded_passes(llmopt.save(model, tmp_path / "out"))["fuse_kernels"]["kv_dtype"] == "int8"
    llmopt.restore(model)
    assert same_bits(snapshot(model), before)
    assert torch.equal(logits(model, ids), expected)
    # the receipt that came with it
    assert llmopt.report(model).passes[0].options["kv_dtype"] is None


def test_a_checkpoint_to_be_optimized_is_opened_without_its_passes(saved: Path) -> None:
    assert list(active_passes(open_model(saved).model)) == NAMES
    assert list(active_passes(open_model(saved, passes=None).model)) == ["quantize_gptq"]


def test_copies_and_pickles(saved: Path) -> None:
    model = llmopt.load(saved)
    twin = copy.deepcopy(model)
    assert list(active_passes(twin)) == NAMES
    assert llmopt.report(twin).to_dict()["passes"][0] == llmopt.report(model).to_dict()["passes"][0]
    assert list(active_passes(pickle.loads(pickle.dumps(model)))) == NAMES
    plain = llmopt.load(saved, passes=None)
    assert list(active_passes(pickle.loads(pickle.dumps(plain)))) == ["quantize_gptq"]


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_an_optimized_model_keeps_receipt_and_passes(
    through: Any, tiny: Any, token_rows: Any, tmp_path: Path
) -> None:
    model = llmopt.optimize(tiny("qwen3"), PASSES, calibration=token_rows(4, 48), measure=False, strict=True)
    twin = through(through(model))
    assert active_passes(twin) == active_passes(model)
    report = llmopt.report(twin)
    assert json.loads(report.to_json())["passes"] == json.loads(llmopt.report(model).to_json())["passes"]
    assert [note.startswith("copied:") for note in report.notes].count(True) == 1
    with pytest.raises(ModelStateError, match=r"fuse_kernels applied already.*a copy"):
        llmopt.optimize(twin, measure=False)
    with pytest.raises(InputError, match=r"not optimized.*a copy"):
        llmopt.restore(twin)
    saved = llmopt.save(twin, tmp_path / "twin")
    assert list(recorded_passes(saved)) == NAMES
    assert recorded_report(saved) is not None
    ids = token_rows(2, 12)
    assert torch.equal(logits(llmopt.load(saved), ids), logits(model, ids))


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ({"fuse_everything": {}}, r"got 'fuse_everything'"),
        ({"fuse_kernels": {"speed": 11}}, r"fuse_kernels: expected options among .*kv_dtype.*, got 'speed'"),
        ({"fuse_kernels": {"kv_dtype": "int3"}}, r"kv_dtype: expected .*, got 'int3'"),
        ({"pool_memory": {"keep_caches": "many"}}, r"passes: "),
    ],
    ids=["pass", "option", "value", "kind"],
)
def test_what_the_record_says_of_passes_is_checked(saved: Path, passes: dict[str, Any], says: str) -> None:
    rewrite(saved, passes)
    with pytest.raises(CheckpointError, match=rf"llmopt\.json: passes: .*{says}" if says != "passes: " else says):
        llmopt.load(saved)
    # who wants none of them is not kept from the weights
    assert active_passes(llmopt.load(saved, passes=None)) == {}


def test_a_pass_that_needs_calibration_is_not_for_load(saved: Path) -> None:
    with pytest.raises(InputError, match="expected those that need no calibration, got 'quantize_gptq'"):
        llmopt.load(saved, passes=["quantize_gptq"])
