"""Checkpoints of other tools: GPTQ by AutoGPTQ and GPTQModel, and plain ones by transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import MODEL_TYPES, MOE_TYPES, AutoGptq, edit_config, edit_tensors, logits, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt import packed
from llmopt.checkpoint import load, recorded_passes, save
from llmopt.checkpoint.experts import ExpertLinears
from llmopt.errors import CheckpointError
from llmopt.models import family_for, resolve_model
from llmopt.packed import QuantExperts, QuantLinear


def weight_of(model: Any, name: str) -> torch.Tensor:
    """The float weight of a loaded linear, by its name on disk."""
    block, _, expert_proj = name.partition(".experts.")
    if not expert_proj:
        return model.get_submodule(name).dequantize()
    expert, proj = expert_proj.split(".")
    experts = model.get_submodule(f"{block}.experts")
    if isinstance(experts, ExpertLinears):
        gate, up, down = experts.linears(int(expert))
        return {"gate_proj": gate, "up_proj": up, "down_proj": down}[proj].dequantize()
    if proj == "down_proj":
        return experts.dequantize("down")[int(expert)]
    return experts.dequantize("gate_up")[int(expert)].chunk(2)[proj == "up_proj"]


def assert_means(model: Any, written: AutoGptq) -> None:
    assert written.weights
    for name, weight in written.weights.items():
        assert torch.equal(weight_of(model, name), weight), name


@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, v2: bool, desc_act: bool
) -> None:
    plain = tiny(model_type, dtype=torch.float32)
    written = AutoGptq(v2=v2, desc_act=desc_act)
    loaded = load(written.write(plain, tmp_path / "in"))
    assert_means(loaded, written)
    rest = {n: t for n, t in plain.state_dict().items() if n in loaded.state_dict()}
    assert len(rest) > 5
    for name, tensor in rest.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    assert torch.isfinite(logits(loaded)).all()
    # without the kernels, which round activations, float layers with the same weights give the same outputs
    monkeypatch.setattr(packed, "uses_kernels", lambda x: False)
    torch.testing.assert_close(logits(loaded), logits(dequantized(plain, written)), rtol=1e-4, atol=1e-4)
    assert recorded_passes(tmp_path / "in") == {}


def dequantized(model: Any, written: AutoGptq) -> Any:
    for name, weight in written.weights.items():
        block, _, expert_proj = name.partition(".experts.")
        if not expert_proj:
            model.get_submodule(name).weight.copy_(weight)
            continue
        expert, proj = expert_proj.split(".")
        experts = model.get_submodule(f"{block}.experts")
        if proj == "down_proj":
            experts.down_proj[int(expert)].copy_(weight)
        else:
            experts.gate_up_proj[int(expert)].chunk(2)[proj == "up_proj"].copy_(weight)
    return model


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 1024, -1])
def test_group_sizes(tmp_path: Path, group_size: int, sym: bool) -> None:
    """Groups larger than the kernels' are read as several with one scale; the last may be short."""
    plain = tiny("qwen3_moe", hidden_size=320, intermediate_size=288, moe_intermediate_size=96)
    written = AutoGptq(group_size=group_size, sym=sym, desc_act=group_size == 256)
    loaded = load(written.write(plain, tmp_path / "in"))
    assert_means(loaded, written)
    assert torch.isfinite(logits(loaded)).all()


def test_activation_order_of_experts_is_kept_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = AutoGptq(desc_act=True)
    with caplog.at_level(logging.WARNING, logger="llmopt"):
        loaded = load(written.write(tiny("qwen3_moe"), tmp_path / "in"))
    assert isinstance(loaded.model.layers[1].mlp.experts, ExpertLinears)
    assert sum("model.layers.1.mlp.experts" in r.getMessage() for r in caplog.records) == 1
    assert resolve_model(loaded).layers[1].experts is not None
    expected = logits(loaded)
    directory = save(loaded, tmp_path / "out")
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["desc_act"] is True
    again = load(directory)
    assert_means(again, written)
    assert torch.equal(logits(again), expected)


def test_desc_act_flag_without_a_permutation_stays_fused(tmp_path: Path) -> None:
    written = AutoGptq()
    loaded = load(written.write(tiny("qwen3_moe"), tmp_path / "in", desc_act=True))
    assert isinstance(loaded.model.layers[1].mlp.experts, QuantExperts)
    assert loaded.model.layers[1].self_attn.q_proj.perm is None
    assert_means(loaded, written)


@pytest.mark.parametrize("model_type", ["qwen2", "deepseek_v3"])
def test_8_bit(tmp_path: Path, model_type: str) -> None:
    written = AutoGptq(bits=8)
    loaded = load(written.write(tiny(model_type), tmp_path / "in"))
    assert loaded.model.layers[0].self_attn.o_proj.bits == 8
    assert_means(loaded, written)
    expected = logits(loaded)
    again = load(save(loaded, tmp_path / "out"))
    assert torch.equal(logits(again), expected)


def test_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    written = AutoGptq(group_size=64)
    written.overrides = {
        "model.layers.0.self_attn.q_proj": {"bits": 8},
        "model.layers.0.self_attn.k_proj": {"group_size": 32},
        "model.layers.1.mlp.up_proj": {"sym": False, "group_size": -1},
    }
    # never evaluated: this pattern would take forever
    dynamic = {r"+:^(([a-z0-9._])+.)+q_proj.*x$": {"bits": 8}}
    loaded = load(written.write(tiny("llama"), tmp_path / "in", dynamic=dynamic))
    attention = loaded.model.layers[0].self_attn
    assert (attention.q_proj.bits, attention.q_proj.group_size) == (8, 64)
    assert (attention.k_proj.bits, attention.k_proj.group_size) == (4, 32)
    assert loaded.model.layers[1].mlp.up_proj.asymmetric
    assert not loaded.model.layers[0].mlp.up_proj.asymmetric
    assert_means(loaded, written)


def test_quantized_head(tmp_path: Path) -> None:
    plain = tiny("qwen3", tie_word_embeddings=True)
    written = AutoGptq(desc_act=True)
    directory = written.write(plain, tmp_path / "in", lm_head=True)
    written.add("lm_head", plain.lm_head.weight.float())
    save_file({**load_file(directory / "model.safetensors"), **written.tensors}, directory / "model.safetensors")
    loaded = load(directory)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert loaded.lm_head.perm is not None
    assert_means(loaded, written)
    assert torch.equal(loaded.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    plain.config.tie_word_embeddings = False
    edit_config(directory, tie_word_embeddings=False)
    untied = load(directory)
    expected = logits(untied)
    assert torch.equal(logits(load(save(untied, tmp_path / "out"))), expected)


def test_old_autogptq_files(tmp_path: Path) -> None:
    """Settings in a file of their own, a name with bits and group, zero biases, no g_idx, rotary frequencies stored."""
    written = AutoGptq()
    directory = written.write(tiny("llama", dtype=torch.float16), tmp_path / "in", zero_biases=True)
    edit_config(directory, quantization_config=...)
    (directory / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    tensors = {n: t for n, t in load_file(directory / "model.safetensors").items() if not n.endswith("g_idx")}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "gptq_model-4bit-32g.safetensors")
    loaded = load(directory)
    assert_means(loaded, written)
    assert loaded.model.layers[0].self_attn.q_proj.bias is None


def test_bias_that_the_model_lacks(tmp_path: Path) -> None:
    directory = AutoGptq().write(tiny("llama"), tmp_path / "in", zero_biases=True)
    edit_tensors(directory, **{"model.layers.0.self_attn.q_proj.bias": lambda t: t + 1})
    bias = load(directory).model.layers[0].self_attn.q_proj.bias
    assert bias.dtype == torch.bfloat16
    assert (bias == 1).all()


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_scales_of_other_dtypes(tmp_path: Path, scales: torch.dtype) -> None:
    written = AutoGptq(scales=scales)
    loaded = load(written.write(tiny("qwen3"), tmp_path / "in"))
    for name, weight in written.weights.items():
        assert torch.allclose(weight_of(loaded, name), weight, rtol=2**-10, atol=0), name


def test_kept_projection_may_be_quantized(tmp_path: Path) -> None:
    """GPTQModel quantizes MLA's kv_a projection, which we leave alone."""
    written = AutoGptq()
    plain = tiny("deepseek_v2")
    directory = written.write(plain, tmp_path / "in")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    weight = load_file(directory / "model.safetensors")[f"{name}.weight"].float()
    written.add(name, weight)
    tensors = {**load_file(directory / "model.safetensors"), **written.tensors}
    del tensors[f"{name}.weight"]
    save_file(tensors, directory / "model.safetensors")
    loaded = load(directory)
    assert_means(loaded, written)
    assert torch.isfinite(logits(loaded)).all()


def test_layers_of_multi_token_prediction_are_passed_over(tmp_path: Path) -> None:
    directory = save(tiny("deepseek_v3"), tmp_path / "in")
    (directory / "llmopt.json").unlink()
    edit_config(directory, num_nextn_predict_layers=0)
    edit_tensors(directory, **{"model.layers.3.eh_proj.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        load(directory)
    edit_config(directory, num_nextn_predict_layers=1)
    assert len(load(directory).model.layers) == 3


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_plain_as_transformers_reads_it(tmp_path: Path, model_type: str, fused: bool) -> None:
    model = tiny(model_type)
    model.save_pretrained(tmp_path, save_original_format=not fused)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("experts.gate_up_proj" in n for n in names) is (fused and model_type in MOE_TYPES)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype="auto")
    ours = load(tmp_path)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        assert ours.state_dict()[name].dtype == tensor.dtype, name
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name
    assert ours.dtype == theirs.dtype
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert torch.equal(logits(ours), logits(theirs))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("stated", ["float32", "float16", "bfloat16", None])
def test_dtype_is_what_the_config_says(tmp_path: Path, stated: str | None) -> None:
    tiny("ernie4_5_moe", dtype=torch.float16).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=...)
    edit_config(tmp_path, torch_dtype=stated)
    loaded = load(tmp_path)
    assert loaded.model.embed_tokens.weight.dtype == getattr(torch, stated or "float16")
    for fragment in family_for("ernie4_5_moe").keep_fp32:
        kept = [t for n, t in loaded.state_dict().items() if fragment in n]
        assert kept
        assert all(t.dtype == torch.float32 for t in kept)


def test_stored_tied_head(tmp_path: Path) -> None:
    tiny("qwen3").save_pretrained(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, **{"lm_head.weight": table})
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    edit_tensors(tmp_path, **{"lm_head.weight": table + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected the values of model\.embed_tokens\.weight"):
        load(tmp_path)


def test_link_into_a_download_cache(tmp_path: Path) -> None:
    """Hugging Face keeps files under blobs and links to them from snapshots."""
    source = save(tiny("qwen3"), tmp_path / "source")
    (source / "llmopt.json").unlink()
    repo = tmp_path / "models--x--y"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert torch.equal(logits(load(snapshot)), logits(tiny("qwen3")))
    elsewhere = tmp_path / "elsewhere.json"
    (snapshot / "config.json").resolve().rename(elsewhere)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"config\.json: leaves the checkpoint directory"):
        load(snapshot)
