"""restore: bit by bit and object by object, from memory or from disk, and nothing left lying about."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import llmopt
from llmopt import originals
from llmopt.errors import CheckpointError, InputError
from llmopt.model_state import is_optimized
from llmopt.models import FAMILIES, resolve_model
from llmopt.originals import Originals
from llmopt.passes import QuantizeGptq
from llmopt.passes.base import Patch, Swap
from llmopt.stages import EAGER, STOCK, Stages

FAMILY_NAMES = [f.model_type for f in FAMILIES]
PASSES = [QuantizeGptq(group_size=64)]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def objects(model: nn.Module) -> dict[str, Any]:
    """Every module, parameter and buffer, shared ones under each of their names."""
    found: dict[str, Any] = {f"module {n}": m for n, m in model.named_modules(remove_duplicate=False)}
    found |= {f"parameter {n}": p for n, p in model.named_parameters(remove_duplicate=False)}
    return found | {f"buffer {n}": b for n, b in model.named_buffers(remove_duplicate=False)}


def same_objects(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(a[n] is b[n] for n in a)


@pytest.fixture
def spilling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Originals go to disk however small they are; gives the folder they go to."""
    monkeypatch.setattr(originals, "_SMALL_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def spilled(folder: Path) -> list[Path]:
    return list(folder.rglob("originals.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "where"), [(torch.float32, "memory"), (torch.bfloat16, "disk")], ids=["f32-memory", "bf16-disk"]
)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_model_comes_back_bit_by_bit(
    family: str, dtype: torch.dtype, where: str, tiny: Any, token_rows: Any, same_bits: Any, snapshot: Any,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    folder = request.getfixturevalue("spilling") if where == "disk" else None
    model, ids = tiny(family, dtype), token_rows(2, 20)
    before, was, expected = snapshot(model), objects(model), logits(model, ids)
    strides = {n: p.stride() for n, p in model.named_parameters()}
    config = {k: repr(v) for k, v in vars(model.config).items()}
    tied = resolve_model(model).tied
    llmopt.optimize(model, None, measure=False)
    assert not torch.equal(logits(model, ids), expected)
    if folder is not None:
        (file,) = spilled(folder)
        assert file.stat().st_size > 0.9 * llmopt.report(model).passes[0].coverage["weight_bytes_before"]
        assert any("wait on disk" in note for note in llmopt.report(model).notes)
        # what was replaced has left memory
        assert was["parameter model.layers.0.mlp.down_proj.weight"].numel() == 0
    assert llmopt.restore(model) is model
    assert torch.equal(logits(model, ids), expected)
    assert same_objects(objects(model), was)
    assert same_bits(model.state_dict(), before)
    assert {n: p.stride() for n, p in model.named_parameters()} == strides
    assert {k: repr(v) for k, v in vars(model.config).items()} == config
    assert resolve_model(model).tied == tied
    assert folder is None or list(folder.iterdir()) == []


def test_restore_after_use_and_again(tiny: Any, token_rows: Any, spilling: Path) -> None:
    model, ids = tiny("ernie4_5_moe"), token_rows(2, 20)
    expected = logits(model, ids)
    packed = []
    for _ in range(2):
        llmopt.optimize(model, PASSES, measure=False)
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        packed.append({n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.uint8})
        llmopt.restore(model)
        assert torch.equal(logits(model, ids), expected)
        with pytest.raises(InputError, match="not optimized"):
            llmopt.restore(model)
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(packed[0][n], packed[1][n]) for n in packed[0])


def test_frozen_and_trainable_parameters_stay_what_they_were(tiny: Any, spilling: Path) -> None:
    model = tiny("qwen3")
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    wanted = [p.requires_grad for p in model.parameters()]
    llmopt.optimize(model, PASSES, measure=False)
    llmopt.restore(model)
    assert [p.requires_grad for p in model.parameters()] == wanted


# ---- disk


def test_no_room_on_disk_keeps_the_weights_in_memory(
    tiny: Any, token_rows: Any, spilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(spilling)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    model, ids = tiny("qwen3"), token_rows(2, 20)
    expected = logits(model, ids)
    llmopt.optimize(model, PASSES, measure=False)
    assert spilled(spilling) == []
    assert any("stay in memory for restore(): only" in note for note in llmopt.report(model).notes)
    llmopt.restore(model)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error")], ids=["os", "file"]
)
def test_a_disk_that_fails_keeps_the_weights_in_memory(
    error: Exception, tiny: Any, token_rows: Any, spilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(originals, "save_file", fail)
    model, ids = tiny("qwen3"), token_rows(2, 20)
    expected = logits(model, ids)
    llmopt.optimize(model, PASSES, measure=False)
    assert any("stay in memory for restore()" in note and str(error) in note for note in llmopt.report(model).notes)
    assert list(spilling.iterdir()) == []
    llmopt.restore(model)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_lost_file_is_named_and_the_optimized_model_goes_on(
    how: str, tiny: Any, token_rows: Any, spilling: Path
) -> None:
    model, ids = tiny("qwen3"), token_rows(2, 20)
    llmopt.optimize(model, PASSES, measure=False)
    expected = logits(model, ids)
    (file,) = spilled(spilling)
    data = file.read_bytes()
    file.unlink() if how == "gone" else file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="original weights cannot be read back") as caught:
        llmopt.restore(model)
    assert str(file) in str(caught.value)
    assert torch.equal(logits(model, ids), expected)
    assert llmopt.report(model).kept()
    # once the file is back, so is the way back
    file.write_bytes(data)
    llmopt.restore(model)


def test_small_models_stay_in_memory_and_say_so(tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny("qwen3")
    llmopt.optimize(model, PASSES, measure=False)
    assert any("stay in memory for restore()" in note for note in llmopt.report(model).notes)
    assert list(tmp_path.iterdir()) == []


def test_a_dropped_model_takes_its_file_along(tiny: Any, spilling: Path) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, PASSES, measure=False)
    assert len(spilled(spilling)) == 1
    del model
    gc.collect()
    assert list(spilling.iterdir()) == []


def test_a_dropped_model_is_freed(tiny: Any) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, PASSES, measure=False)
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


def test_a_restored_model_is_forgotten(tiny: Any, spilling: Path) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, PASSES, measure=False)
    llmopt.restore(model)
    assert not is_optimized(model)
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


# ---- what is kept


def test_weights_still_in_use_are_not_taken_away(tiny: Any, spilling: Path) -> None:
    """A tied head is replaced while the embedding stays: the one weight of both must stay too."""
    model = tiny("qwen3")
    table = model.get_input_embeddings().weight
    patch = Patch([Swap(model, "lm_head", nn.Linear(128, 512, bias=False))])
    patch.enable()
    kept = Originals(model, [patch])
    assert kept.num_bytes == 0
    kept.spill()
    assert table.numel() == 512 * 128


def test_one_original_can_be_read_wherever_it_is(tiny: Any, spilling: Path) -> None:
    model = tiny("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    values = weight.detach().clone()
    patch = Patch([Swap(model.model.layers[1].mlp, "up_proj", nn.Identity())])
    patch.enable()
    kept = Originals(model, [patch])
    assert kept.num_bytes == values.numel() * 4
    assert torch.equal(kept.tensor(weight), values)
    kept.spill()
    assert kept.where == "disk"
    assert weight.numel() == 0
    assert torch.equal(kept.tensor(weight), values)
    norm = model.model.norm.weight
    assert torch.equal(kept.tensor(norm), norm)
    kept.bring_back()
    assert kept.where == "memory"
    assert torch.equal(weight, values)
    kept.bring_back()
    assert torch.equal(weight, values)


def test_parameters_that_are_views_stay_views(tiny: Any, token_rows: Any, spilling: Path) -> None:
    model, ids = tiny("llama"), token_rows(2, 20)
    mlp = model.model.layers[0].mlp
    flat = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
    mlp.gate_proj.weight, mlp.up_proj.weight = nn.Parameter(flat[:256]), nn.Parameter(flat[256:])
    expected = logits(model, ids)
    llmopt.optimize(model, PASSES, measure=False)
    llmopt.restore(model)
    assert torch.equal(logits(model, ids), expected)
    assert mlp.gate_proj.weight.data_ptr() == flat.data_ptr()
    assert mlp.up_proj.weight.data_ptr() == flat[256:].data_ptr()


def test_transposed_parameters_keep_their_strides(tiny: Any, token_rows: Any, spilling: Path) -> None:
    model, ids = tiny("llama"), token_rows(2, 20)
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().T.contiguous().T)
    expected = logits(model, ids)
    llmopt.optimize(model, PASSES, measure=False)
    llmopt.restore(model)
    assert down.weight.stride() == (1, 128)
    assert torch.equal(logits(model, ids), expected)


def test_a_copy_of_an_optimized_model_runs_on_its_own(tiny: Any, token_rows: Any, spilling: Path) -> None:
    model, ids = tiny("deepseek_v3"), token_rows(2, 20)
    expected = logits(model, ids)
    llmopt.optimize(model, PASSES, measure=False)
    optimized = logits(model, ids)
    twin = copy.deepcopy(model)
    llmopt.restore(model)
    assert torch.equal(logits(twin, ids), optimized)
    assert torch.equal(logits(model, ids), expected)
    with pytest.raises(InputError, match="not optimized"):
        llmopt.restore(twin)


def test_an_optimized_model_can_be_pickled(tiny: Any, token_rows: Any) -> None:
    model, ids = tiny("ernie4_5_moe"), token_rows(2, 20)
    llmopt.optimize(model, PASSES, measure=False)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, ids), logits(model, ids))
    with pytest.raises(InputError, match="not optimized"):
        llmopt.restore(twin)


# ---- stages


def test_stages_show_what_is_asked_for(tiny: Any) -> None:
    model = tiny("qwen3_moe")
    stages = Stages(model)
    given = (model.config._attn_implementation, model.config._experts_implementation)
    assert stages.given == given
    a, b = Patch([Swap(model, "note_a", 1)]), Patch([Swap(model, "note_b", 1)])

    def shown() -> tuple[bool, bool, str, str]:
        config = model.config
        return (
            hasattr(model, "note_a"), hasattr(model, "note_b"), config._attn_implementation, config._experts_implementation,
        )  # fmt: skip

    for patches, over in (
        ([a], None), ([a, b], None), ([b], EAGER), ([b], STOCK), ([b], None), ([], EAGER), ([], None), ([b, a], EAGER),
    ):  # fmt: skip
        assert stages.show(patches, over) is model
        assert shown() == (a in patches, b in patches, *(over or given))
    later = stages.stage((a,), EAGER)
    assert stages.as_given() is model
    assert shown() == (False, False, *given)
    later()
    assert shown() == (True, False, *EAGER)
    stages.as_given()
    assert shown() == (False, False, *given)


def test_a_patch_that_fails_leaves_the_patches_before_it(tiny: Any) -> None:
    model = tiny("qwen3")
    stages = Stages(model)

    def fail() -> None:
        raise RuntimeError("cannot")

    good, bad = Patch([Swap(model, "note_a", 1)]), Patch([Swap(model, "note_b", 1)], on_enable=fail)
    stages.show([good])
    with pytest.raises(RuntimeError, match="cannot"):
        stages.show([good, bad])
    assert not hasattr(model, "note_b")
    stages.show([good])
    assert hasattr(model, "note_a")
    stages.as_given()
    assert not hasattr(model, "note_a")
