"""Published shapes: the right sizes, built fast, small and the same every time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmopt.errors import InputError, UnsupportedModelError
from llmopt.models import FAMILIES, family_for, resolve_model
from llmopt.models.shapes import (
    SHAPES,
    build,
    config_for,
    layer_bytes,
    materialize_,
    meta_model,
    parameter_bytes,
    tiny_model,
)

EVERY_TYPE = [family.model_type for family in FAMILIES]

# parameters as the hub counts them, tied weights once
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "ernie-4.5-0.3b": 360_748_032,
    "ernie-4.5-21b-a3b": 21_825_437_888,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "deepseek-v3": 671_026_404_352,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**family_for(model_type).tiny_config, **changes})


def test_every_shape_has_a_known_size() -> None:
    assert set(SHAPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str) -> None:
    model = meta_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    resolved = resolve_model(model)
    assert resolved.family.model_type == SHAPES[name].model_type
    assert len(resolved.layers) == model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("name", "rope_type", "theta", "scaling"),
    [
        ("qwen3-0.6b", "default", 1e6, 1.0),
        ("ernie-4.5-0.3b", "default", 5e5, 1.0),
        ("deepseek-r1-distill-qwen-1.5b", "default", 1e4, 1.0),
        ("deepseek-r1-distill-llama-8b", "llama3", 5e5, 1.0),
        # mscale / mscale_all_dim is 1 in both, so cos and sin are not scaled
        ("deepseek-v2-lite", "yarn", 1e4, 1.0),
        ("deepseek-v3", "yarn", 1e4, 1.0),
    ],
)
def test_rope_of_a_shape(name: str, rope_type: str, theta: float, scaling: float) -> None:
    rotary = meta_model(name).model.rotary_emb
    assert rotary.rope_type == rope_type
    assert rotary.config.rope_parameters["rope_theta"] == theta
    assert rotary.attention_scaling == scaling
    assert not rotary.inv_freq.is_meta
    assert rotary.inv_freq.dtype == torch.float32
    assert rotary.inv_freq[0] == 1.0
    assert (rotary.inv_freq.diff() < 0).all()


def test_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"got 'qwen3-0\.6B'; nearest: qwen3-0\.6b"):
        config_for("qwen3-0.6B")


def test_unsupported_dtype_is_refused() -> None:
    with pytest.raises(InputError, match=r"dtype: expected torch\.float32"):
        meta_model("qwen3-0.6b", dtype=torch.float8_e4m3fn)


def test_unsupported_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="qwen2_moe"):
        build(AutoConfig.for_model("qwen2_moe"))


@pytest.mark.parametrize("count", [0, 29, -1])
def test_num_layers_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(InputError, match="num_layers: expected 1 to 28"):
        meta_model("qwen3-0.6b", num_layers=count)


@pytest.mark.parametrize(
    ("name", "count", "moe"),
    [
        ("deepseek-v3", 5, [False, False, False, True, True]),
        ("deepseek-v2-lite", 2, [False, True]),
        ("ernie-4.5-21b-a3b", 3, [False, True, True]),
        ("qwen3-30b-a3b", 2, [True, True]),
        ("qwen3-0.6b", 1, [False]),
    ],
)
def test_fewer_layers_keep_the_leading_layout(name: str, count: int, moe: list[bool]) -> None:
    config = config_for(name)
    model = meta_model(name, num_layers=count)
    resolved = resolve_model(model)
    assert [layer.experts is not None for layer in resolved.layers] == moe
    assert model.config.num_hidden_layers == count
    assert config.num_hidden_layers > count
    assert layer_bytes(model.config) == layer_bytes(config)[:count]
    cut = config_for(f"{name}@{count}")
    assert cut.num_hidden_layers == count
    assert layer_bytes(cut) == layer_bytes(model.config)


@pytest.mark.parametrize("name", ["qwen3-0.6b@0", "qwen3-0.6b@29", "qwen3-0.6b@", "qwen3-0.6b@x", "qwen4@2", "@2"])
def test_a_shape_that_cannot_be_cut_so_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="NAME@LAYERS"):
        config_for(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_build_gives_what_loading_the_same_weights_gives(model_type: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """Dtypes (float32 islands included), tying, rotary tables and logits are those of from_pretrained."""
    model = tiny_model(model_type, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    ours.update(model.named_buffers())
    theirs.update(loaded.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
        assert not tensor.requires_grad
    assert not model.training
    tokens = torch.arange(24)[None] + 3
    with torch.no_grad():
        logits = model(tokens).logits
        torch.testing.assert_close(logits, loaded(tokens).logits, rtol=0, atol=0)
    assert logits.isfinite().all()
    assert logits.float().std() > 0.1


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_same_seed_same_bytes_and_another_seed_others() -> None:
    first, again, other = (weights(tiny_model("deepseek_v3", seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name, tensor in first.items() if tensor.ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    tiny_model("qwen3")
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_normal_and_no_two_rows_are_equal() -> None:
    # larger than one block of random values, so that the tiling shows
    model = build(tiny_config("qwen3", vocab_size=40_000, initializer_range=0.05))
    embedding = model.get_input_embeddings().weight
    assert embedding.numel() > 5_000_000
    assert embedding.float().mean().abs() < 1e-3
    assert abs(embedding.float().std() - 0.05) < 1e-3
    assert len(torch.unique(embedding, dim=0)) == len(embedding)
    layers = model.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)
    assert (layers[0].input_layernorm.weight == 1).all()


def test_biases_are_zero() -> None:
    model = tiny_model("qwen2")
    assert (model.model.layers[0].self_attn.q_proj.bias == 0).all()
    assert (tiny_model("deepseek_v3").model.layers[1].mlp.gate.e_score_correction_bias == 0).all()


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_filling_layer_by_layer_gives_the_values_of_build(model_type: str) -> None:
    config = tiny_config(model_type)
    whole = weights(build(config, seed=3))
    model = meta_model(config)
    for i, layer in enumerate(model.model.layers):
        assert all(parameter.is_meta for parameter in layer.parameters())
        assert materialize_(layer, prefix=f"model.layers.{i}", seed=3, std=config.initializer_range) is layer
        assert not any(tensor.is_meta for tensor in weights(layer).values())
    materialize_(model, seed=3, std=config.initializer_range)
    parts = weights(model)
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name


def test_tied_weights_stay_tied() -> None:
    model = tiny_model("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny_model("qwen2").lm_head.weight is not tiny_model("qwen2").model.embed_tokens.weight


@pytest.mark.parametrize("model_type", ["qwen3", "deepseek_v2"])
def test_generation_does_not_stop_at_the_end_of_sequence_token(model_type: str) -> None:
    model = tiny_model(model_type)
    eos = model.config.eos_token_id
    assert eos == 2

    def only_eos(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, float("-inf")).index_fill_(1, torch.tensor([eos]), 0.0)

    tokens = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False, logits_processor=[only_eos], use_cache=True
    )
    assert tokens[0, 3:].tolist() == [eos] * 12


@pytest.mark.parametrize("model_type", EVERY_TYPE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_are_those_of_the_built_model(model_type: str, dtype: torch.dtype) -> None:
    config = tiny_config(model_type)
    model = build(config, dtype=dtype)
    state = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    assert parameter_bytes(config, dtype) == sum(t.numel() * t.element_size() for t in state.values())
    per_layer = [sum(t.numel() * t.element_size() for t in layer.state_dict().values()) for layer in model.model.layers]
    assert layer_bytes(config, dtype) == tuple(per_layer)


PEAK = """
    import torch
    from pathlib import Path
    from transformers import AutoConfig
    from llmopt.models.shapes import build, parameter_bytes

    def status(key):
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))
        return int(line.split()[1]) * 1024

    def make(hidden, inter, layers, vocab):
        return AutoConfig.for_model(
            "{model_type}", **{tiny!r} | dict(
                hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers, vocab_size=vocab, {extra}
            )
        )

    build(make(128, 256, 2, 512))  # loads the lazy parts of torch and transformers
    config = make(1024, 3072, 8, 32768)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = build(config)
    print(parameter_bytes(config), status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model_type", "extra"), [("qwen3", ""), ("ernie4_5_moe", "moe_intermediate_size=inter // 4")], ids=["dense", "moe"]
)
def test_peak_memory_is_at_most_a_fifth_above_the_model(model_type: str, extra: str) -> None:
    code = PEAK.format(model_type=model_type, tiny=family_for(model_type).tiny_config, extra=extra)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True, timeout=300
    )
    model_bytes, peak, resting = map(int, done.stdout.split())
    assert model_bytes > 200e6
    assert resting > 0.9 * model_bytes
    assert peak <= 1.2 * model_bytes
