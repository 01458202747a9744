"""save, then load: the same model, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import MODEL_TYPES, MOE_TYPES, logits, quant_linear, quantize, tiny
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmopt
from llmopt.checkpoint import load, recorded_passes, recorded_report, save
from llmopt.checkpoint.quant_config import FORMATS
from llmopt.errors import InputError, ModelStateError
from llmopt.measure.report import PassRow, Report
from llmopt.models import resolve_model
from llmopt.ops.packed_tiles import packed_sums
from llmopt.packed import QuantEmbedding, QuantExperts, QuantLinear
from llmopt.passes import QuantizeGptq
from llmopt.passes.quantize_gptq.rounding import Grid


def assert_same_state(one: Any, other: Any) -> None:
    expected, got = one.state_dict(), other.state_dict()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type)
    originals = quantize(model)
    expected = logits(model)
    loaded = load(save(model, tmp_path / "out", originals=originals))
    assert_same_state(model, loaded)
    assert torch.equal(logits(loaded), expected)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config._name_or_path == str(tmp_path / "out")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_unquantized(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type)
    directory = save(model, tmp_path / "out")
    loaded = load(directory)
    assert_same_state(model, loaded)
    assert torch.equal(logits(loaded), logits(model))
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(theirs), logits(model))
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_settings(tmp_path: Path, group_size: int, sym: bool, checkpoint_format: Any) -> None:
    # sizes that groups of 128 do not divide
    model = tiny("qwen3_moe", hidden_size=160, moe_intermediate_size=80, intermediate_size=224)
    quantize(model, group_size=group_size, sym=sym)
    expected = logits(model)
    directory = save(model, tmp_path / "out", checkpoint_format=checkpoint_format)
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert {k: stated[k] for k in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": sym, "desc_act": False,
        "checkpoint_format": checkpoint_format,
    }  # fmt: skip
    assert torch.equal(logits(load(directory)), expected)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_v2_keeps_every_packed_byte(tmp_path: Path, group_size: int, sym: bool) -> None:
    """Zero points of 0 too, which v1 writes mirrored: other bytes, the same weights."""
    model = tiny("qwen3_moe")
    model.model.layers[0].mlp.up_proj.weight.data.abs_()
    quantize(model, group_size=group_size, sym=sym)
    expected = logits(model)
    loaded = {name: load(llmopt.save(model, tmp_path / name, checkpoint_format=name)) for name in FORMATS}
    assert_same_state(model, loaded["gptq_v2"])
    for name, other in loaded.items():
        assert torch.equal(logits(other), expected)
        stated = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert (stated["checkpoint_format"], stated["format"], stated["sym"]) == (name, name, sym)
    own, mirrored = (m.model.layers[0].mlp.up_proj for m in (model, loaded["gptq"]))
    assert torch.equal(mirrored.dequantize(), own.dequantize())
    assert torch.equal(mirrored.packed, own.packed) is sym
    stored = load_file(tmp_path / "gptq_v2" / "model.safetensors")["model.layers.0.mlp.up_proj.qzeros"]
    assert (stored == (torch.tensor(0x88888888 - 2**32, dtype=torch.int32) if sym else 0)).all()


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_an_optimized_model_as_v2(tmp_path: Path, sym: bool) -> None:
    model = tiny("ernie4_5_moe")
    rows = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    llmopt.optimize(model, [QuantizeGptq(group_size=32, sym=sym)], calibration=rows, measure=False)
    directory = llmopt.save(model, tmp_path / "out", checkpoint_format="gptq_v2")
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["format"] == "gptq_v2"
    loaded = llmopt.load(directory)
    assert_same_state(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["gptq_v3", "v2", "marlin", None, 2])
def test_a_format_that_cannot_be_written(tmp_path: Path, name: Any) -> None:
    for write in (save, llmopt.save):
        with pytest.raises(InputError, match=r"^checkpoint_format: expected 'gptq' or 'gptq_v2', got "):
            write(tiny("qwen3"), tmp_path / "out", checkpoint_format=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("with_originals", [True, False], ids=["originals", "dequantized"])
def test_head(tmp_path: Path, dtype: torch.dtype, tied: bool, bits: int | None, with_originals: bool) -> None:
    model = tiny("qwen3", dtype=dtype, tie_word_embeddings=tied, vocab_size=500)
    originals = quantize(model, head_bits=bits)
    expected = logits(model)
    directory = save(model, tmp_path / "out", originals=originals if with_originals else None)
    loaded = load(directory)
    assert torch.equal(logits(loaded), expected)
    stored = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    if with_originals:
        assert torch.equal(stored["model.embed_tokens.weight"], originals["model.embed_tokens.weight"])
    if bits is not None:
        assert loaded.lm_head.packed.data_ptr() == loaded.model.embed_tokens.packed.data_ptr() or not tied
        assert loaded.model.embed_tokens.dtype == dtype
    elif tied:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_head_that_is_not_rounded_to_nearest(tmp_path: Path) -> None:
    """GPTQ moves codes away from the nearest ones: then the file holds what the codes mean, not the original."""
    model = tiny("qwen3")
    originals = quantize(model, head_bits=4)
    head = model.lm_head
    head.packed[:, -3] ^= 0x11  # shared with the embedding
    packed_sums(head.packed, in_features=head.in_features, group_size=head.group_size, bits=4)
    expected = logits(model)
    directory = save(model, tmp_path / "out", originals=originals)
    stored = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, model.lm_head.dequantize().bfloat16())
    loaded = load(directory)
    assert torch.equal(loaded.lm_head.packed, model.lm_head.packed)
    assert torch.equal(logits(loaded), expected)


def test_only_the_head_quantized(tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.lm_head = quant_linear(model.lm_head, Grid(8, True), 128)
    expected = logits(model)
    directory = save(model, tmp_path / "out")
    loaded = load(directory)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert torch.equal(logits(loaded), expected)


def test_tied_head_with_codes_of_its_own_is_refused(tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.lm_head = quant_linear(model.lm_head, Grid(4, True), 128)
    model.lm_head.packed[:, -3] ^= 0x11
    with pytest.raises(ModelStateError, match=r"lm_head.*model\.embed_tokens\.weight"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_skipped_modules_stay_plain(tmp_path: Path) -> None:
    model = tiny("ernie4_5_moe")
    originals = quantize(model, skip=("o_proj", "layers.2.mlp.experts"))
    expected = logits(model)
    directory = save(model, tmp_path / "out", originals=originals)
    dynamic = json.loads((directory / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic == {r"-:^model\.layers\.\d+\.self_attn\.o_proj$": {}}
    loaded = load(directory)
    assert isinstance(loaded.model.layers[1].mlp.experts, QuantExperts)
    assert not isinstance(loaded.model.layers[2].mlp.experts, QuantExperts)
    assert torch.equal(logits(loaded), expected)


def test_mixed_settings(tmp_path: Path) -> None:
    model = tiny("qwen2")
    quantize(model, head_bits=None)
    plain = tiny("qwen2")
    model.model.layers[0].mlp.up_proj = quant_linear(plain.model.layers[0].mlp.up_proj, Grid(8, True), 64)
    model.model.layers[1].self_attn.q_proj = quant_linear(plain.model.layers[1].self_attn.q_proj, Grid(4, False), -1)
    expected = logits(model)
    directory = save(model, tmp_path / "out")
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["group_size"], stated["sym"]) == (4, 32, True)
    assert stated["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.up_proj$": {"bits": 8, "group_size": 64, "sym": True},
        r"+:^model\.layers\.1\.self_attn\.q_proj$": {"bits": 4, "group_size": -1, "sym": False},
    }
    assert torch.equal(logits(load(directory)), expected)


@pytest.mark.parametrize("model_type", ["qwen2", "ernie4_5"])
def test_biases(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type, **({"use_bias": True} if model_type == "ernie4_5" else {}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.uniform_(-1, 1)
    originals = quantize(model)
    assert model.model.layers[0].self_attn.q_proj.bias.any()
    expected = logits(model)
    assert torch.equal(logits(load(save(model, tmp_path / "out", originals=originals))), expected)


def test_rows_that_do_not_fill_words(tmp_path: Path) -> None:
    model = tiny("llama", head_dim=34, num_key_value_heads=2, intermediate_size=250)
    quantize(model, sym=False)
    expected = logits(model)
    assert torch.equal(logits(load(save(model, tmp_path / "out"))), expected)


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_names_on_disk(tmp_path: Path, model_type: str) -> None:
    """Other tools expect the names of the original releases: experts apart, ERNIE's bias under mlp."""
    model = tiny(model_type)
    originals = quantize(model)
    directory = save(model, tmp_path / "out", originals=originals)
    tiny(model_type).save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    parts = ("qweight", "qzeros", "scales", "g_idx")
    quantized = {n.removesuffix(".qweight") for n in names if n.endswith(".qweight")}
    assert names == {n for n in plain if n.removesuffix(".weight") not in quantized} | {
        f"{n}.{part}" for n in quantized for part in parts
    }
    assert "model.layers.1.mlp.experts.7.down_proj.qweight" in names
    assert ("model.layers.1.mlp.moe_statics.e_score_correction_bias" in names) is (model_type == "ernie4_5_moe")
    untouched = load_file(directory / "model.safetensors")
    for name in names & plain.keys():
        assert torch.equal(untouched[name], plain[name]), name


def test_shapes_and_dtypes_on_disk(tmp_path: Path) -> None:
    model = tiny("qwen3")
    quantize(model, head_bits=None)
    stored = load_file(save(model, tmp_path / "out") / "model.safetensors")
    found = {p: stored[f"model.layers.0.mlp.down_proj.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
    assert {p: (tuple(t.shape), t.dtype) for p, t in found.items()} == {
        "qweight": ((256 // 8, 128), torch.int32),
        "qzeros": ((8, 128 // 8), torch.int32),
        "scales": ((8, 128), torch.float16),
        "g_idx": ((256,), torch.int32),
    }
    assert (found["qzeros"] == 0x77777777).all()
    assert torch.equal(found["g_idx"], torch.arange(256, dtype=torch.int32) // 32)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_others_compute_the_same_weights(tmp_path: Path, group_size: int, sym: bool) -> None:
    """By the formula of AutoGPTQ's own forward pass: shift, mask, add one to each zero, look the group up in g_idx."""
    model = tiny("qwen3_moe")
    model.model.layers[0].mlp.up_proj.weight.data.abs_()  # nothing below 0: zero points of 0, which v1 cannot say
    quantize(model, group_size=group_size, sym=sym)
    stored = load_file(save(model, tmp_path / "out") / "model.safetensors")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)

    def weight(name: str) -> torch.Tensor:
        qweight, qzeros, scales, g_idx = (stored[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx"))
        zeros = ((qzeros[:, :, None] >> shifts) & 15).flatten(1) + 1
        codes = ((qweight[:, None] >> shifts[:, None]) & 15).flatten(0, 1)
        return (scales.float()[g_idx] * (codes - zeros[g_idx])).t()

    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and name != "lm_head":
            assert torch.equal(weight(name), module.dequantize()), name
        if isinstance(module, QuantExperts):
            gate_up = [torch.cat([weight(f"{name}.{e}.gate_proj"), weight(f"{name}.{e}.up_proj")]) for e in range(8)]
            assert torch.equal(torch.stack(gate_up), module.dequantize("gate_up"))
            down = torch.stack([weight(f"{name}.{e}.down_proj") for e in range(8)])
            assert torch.equal(down, module.dequantize("down"))
    if not sym:
        assert (model.model.layers[0].mlp.up_proj.codes()[2] == 0).all()


def test_shards(tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    originals = quantize(model)
    expected = logits(model)
    directory = save(model, tmp_path / "out", originals=originals, max_shard_bytes=100_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    stored = {name: load_file(directory / name) for name in shards}
    for tensor, name in index["weight_map"].items():
        assert tensor in stored[name]
    total = sum(t.numel() * t.element_size() for tensors in stored.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert all(sum(t.numel() * t.element_size() for t in f.values()) <= 100_000 or len(f) == 1 for f in stored.values())
    assert torch.equal(logits(load(directory)), expected)


def test_config_is_one_that_transformers_reads(tmp_path: Path) -> None:
    model = tiny("deepseek_v2")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling.Evil"}
    model.generation_config.temperature = 0.25
    quantize(model)
    directory = save(model, tmp_path / "out")
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    assert type(config) is type(model.config)
    assert config.dtype == torch.bfloat16
    assert config.quantization_config["quant_method"] == "gptq"
    data = json.loads((directory / "config.json").read_text())
    assert "auto_map" not in data
    assert data["architectures"] == ["DeepseekV2ForCausalLM"]
    loaded = load(directory)
    assert loaded.generation_config.temperature == 0.25
    assert loaded.generation_config.eos_token_id == 2
    assert getattr(loaded.config, "quantization_config", None) is None


def test_save_again(tmp_path: Path) -> None:
    """A loaded model can be saved, over its own checkpoint too, and the files are the same."""
    model = tiny("qwen3_moe")
    originals = quantize(model, sym=False)
    directory = save(model, tmp_path / "out", originals=originals)
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    save(load(directory), directory, originals=originals)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_what_is_recorded(tmp_path: Path) -> None:
    model = tiny("qwen3")
    quantize(model)
    report = Report(model={"name": "tiny"}, environment={}, settings={})
    report.passes = [
        PassRow("quantize_gptq", "kept", "", options={"group_size": 32}),
        PassRow("swap_flash_attention", "undone", "slower"),
    ]
    directory = save(model, tmp_path / "out", report=report)
    assert recorded_passes(directory) == {"quantize_gptq": {"group_size": 32}}
    assert Report.from_json(json.dumps(recorded_report(directory))) == report
    save(model, directory, passes={"b": {"x": [1]}, "a": {}})
    assert list(recorded_passes(directory).items()) == [("b", {"x": [1]}), ("a", {})]
    assert recorded_report(directory) is None
    assert json.loads((directory / "llmopt.json").read_text())["libraries"]["torch"] == torch.__version__


def test_dtype_can_be_chosen(tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    directory = save(model, tmp_path / "out", originals=quantize(model))
    loaded = load(directory, dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert logits(loaded).dtype == torch.float32
    half = load(directory, dtype=torch.float16)
    bias = half.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert logits(half).dtype == torch.float16
    with pytest.raises(InputError, match="dtype"):
        load(directory, dtype=torch.int8)


def test_generate(tmp_path: Path) -> None:
    model = tiny("ernie4_5")
    originals = quantize(model)
    loaded = load(save(model, tmp_path / "out", originals=originals))
    prompt = torch.tensor([[1, 2, 3, 4]])
    wanted = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


def test_parts_are_found_in_a_loaded_plain_model(tmp_path: Path) -> None:
    """What load gives is a model that can be optimized."""
    loaded = load(save(tiny("deepseek_v2"), tmp_path / "out"))
    assert len(resolve_model(loaded).layers) == 3
    assert not isinstance(loaded.model.embed_tokens, QuantEmbedding)


def test_bad_arguments(tmp_path: Path) -> None:
    model = tiny("qwen3")
    with pytest.raises(InputError, match="checkpoint_format"):
        save(model, tmp_path / "out", checkpoint_format="marlin")  # type: ignore[arg-type]
    originals = quantize(model)
    originals["model.embed_tokens.weight"] = originals["model.embed_tokens.weight"][:, :64]
    with pytest.raises(InputError, match=r"originals\['model.embed_tokens.weight'\].*\(512, 128\)"):
        save(model, tmp_path / "out", originals=originals)
    with pytest.raises(InputError, match="model"):
        save(torch.nn.Linear(2, 2), tmp_path / "out")
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelStateError, match=r"model\.layers\.0\.extra"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
