"""Bytes one decode step reads, counted by hand for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.checkpoint.experts import ExpertLinears
from llmopt.measure import traffic
from llmopt.measure.report import Ceilings, Interval, Timing
from llmopt.models import FAMILIES, resolve_model
from llmopt.packed import QuantLinear
from llmopt.passes import FuseKernels, QuantizeGptq, SwapFlashAttention
from llmopt.passes.base import PassContext
from llmopt.runtime.engine import Engine

FAMILY_NAMES = [f.model_type for f in FAMILIES]
MOE_NAMES = [f.model_type for f in FAMILIES if f.moe]


def size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def by_hand(model: Any) -> float:
    """Every tensor once; of the routed experts the share chosen; no input embedding unless it is the head."""
    top_k, experts = 2, 8  # of all tiny configs
    head = model.get_output_embeddings()
    heads = {t.data_ptr() for t in (*head.parameters(), *head.buffers())}
    total, seen = 0.0, set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.data_ptr() in seen or ("embed_tokens" in name and tensor.data_ptr() not in heads):
            continue
        seen.add(tensor.data_ptr())
        routed = ".experts." in name
        total += size(tensor) * (top_k / experts if routed else 1)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_weights_read_for_one_token(family: str, dtype: torch.dtype, tiny: Any, token_rows: Any) -> None:
    model = tiny(family, dtype)
    resolved = resolve_model(model)
    before = traffic.weight_bytes_per_token(resolved)
    assert before == pytest.approx(by_hand(model), rel=0.01)
    context = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(2, 24)))
    applied = QuantizeGptq(group_size=64).apply(context)
    applied.patch.enable()
    after = traffic.weight_bytes_per_token(resolved)
    assert after == pytest.approx(by_hand(model), rel=0.01)
    assert after < before * (0.5 if dtype == torch.float32 else 0.8)
    applied.patch.disable()
    assert traffic.weight_bytes_per_token(resolved) == before


@pytest.mark.parametrize("family", MOE_NAMES)
def test_experts_count_by_the_share_chosen(family: str, tiny: Any) -> None:
    model = tiny(family)
    resolved = resolve_model(model)
    stacks = sum(size(x.gate_up) + size(x.down) for layer in resolved.layers if (x := layer.experts) is not None)
    total = sum(size(p) for p in model.parameters())
    assert stacks > 0
    read = traffic.weight_bytes_per_token(resolved)
    assert read < total - 0.7 * stacks
    assert read > stacks * 0.25


def test_the_cache_grows_with_depth_and_holds_what_the_family_caches(tiny: Any) -> None:
    for family in FAMILY_NAMES:
        model = tiny(family)
        resolved = resolve_model(model)
        per_token = traffic.kv_bytes(resolved, 1)
        assert traffic.kv_bytes(resolved, 100) == 100 * per_token
        with torch.no_grad():
            cache = model(input_ids=torch.arange(10)[None], use_cache=True).past_key_values
        held = sum(size(t) for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
        assert held == 10 * per_token, family


def test_half_precision_halves_the_cache(tiny: Any) -> None:
    full, half = (resolve_model(tiny("qwen3", d)) for d in (torch.float32, torch.bfloat16))
    assert traffic.kv_bytes(full, 64) == 2 * traffic.kv_bytes(half, 64)


@pytest.mark.skipif(not native.available(), reason="no compiled kernels")
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2", "deepseek_v3"])
def test_the_cache_counts_in_the_dtype_that_the_fused_model_keeps(family: str, kv_dtype: str, tiny: Any) -> None:
    model = tiny(family)
    resolved = resolve_model(model)
    own = traffic.kv_bytes(resolved, 10)
    context = PassContext(resolved, resolved.device, lambda event: None)
    patch = FuseKernels(kv_dtype=kv_dtype).apply(context).patch
    patch.enable()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(10)[None], use_cache=True).past_key_values
    assert cache.capacity == 10
    assert traffic.kv_bytes(resolved, 10) == sum(size(t) for t in cache.tensors()) < own
    patch.disable()
    assert traffic.kv_bytes(resolved, 10) == own


def test_experts_run_one_by_one_count_by_the_share_chosen(tiny: Any, token_rows: Any) -> None:
    model = tiny("qwen3_moe")
    resolved = resolve_model(model)
    context = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(2, 24)))
    QuantizeGptq(group_size=64).apply(context).patch.enable()
    fused = traffic.weight_bytes_per_token(resolved)
    assert any(layer.experts is not None for layer in resolved.layers)
    for layer in resolved.layers:
        if layer.experts is None:
            continue
        module = getattr(layer.experts.parent, layer.experts.attr)
        parts = [part for e in range(8) for part in one_by_one(module, e)]
        setattr(layer.experts.parent, layer.experts.attr, ExpertLinears(parts[0::3], parts[1::3], parts[2::3]))
    assert traffic.weight_bytes_per_token(resolved) == pytest.approx(fused, rel=0.01)


def one_by_one(module: Any, expert: int) -> list[QuantLinear]:
    """Gate, up and down of one expert of a fused module."""
    gate_up, down = (tuple(t[expert] for t in module.codes(part) if t is not None) for part in ("gate_up", "down"))
    inner = module.intermediate_dim
    wide = [[t[:inner] for t in gate_up], [t[inner:] for t in gate_up]]
    return [QuantLinear.from_codes(q, s, None, None, bits=4, group_size=64) for q, s in (*wide, down)]


@pytest.mark.skipif(not native.available(), reason="no compiled kernels")
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_reads_what_the_engine_made_of_its_weights(family: str, tiny: Any, token_rows: Any) -> None:
    model = tiny(family, torch.bfloat16)
    resolved = resolve_model(model)
    context = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(2, 24)))
    QuantizeGptq(group_size=64).apply(context).patch.enable()
    quantized = traffic.weight_bytes_per_token(resolved)
    SwapFlashAttention(force="llmopt").apply(context).patch.enable()
    with torch.no_grad():
        model(input_ids=torch.arange(10)[None])
    # the copy is there: it would be counted
    assert traffic.weight_bytes_per_token(resolved) > quantized + 10_000
    FuseKernels(screened_head=False).apply(context).patch.enable()
    expected = quantized
    for layer, (attention, _) in zip(resolved.layers, Engine(resolved).layers, strict=True):
        module = layer.attention
        expected += sum(size(half) for half in attention.halves()) - size(module.kv_b_proj.packed)
    # rotary frequencies and the like aside
    assert traffic.weight_bytes_per_token(resolved) == pytest.approx(expected, abs=1000)


def test_share_of_the_bandwidth() -> None:
    decode = Interval(10.0, 9.0, 11.0, 5)
    timing = Timing(decode, decode, 128, 16)
    ceilings = Ceilings(read_gb_per_s=Interval(20.0, 19.0, 21.0, 5))
    assert traffic.bandwidth_fraction(100_000_000, timing, ceilings) == pytest.approx(0.5)
    assert traffic.bandwidth_fraction(100_000_000, None, ceilings) is None
    assert traffic.bandwidth_fraction(100_000_000, timing, None) is None
    assert traffic.bandwidth_fraction(100_000_000, timing, Ceilings()) is None


def test_a_decode_step_reads_weights_and_half_of_what_it_adds_to_the_cache(tiny: Any) -> None:
    resolved = resolve_model(tiny("qwen3"))
    cache = traffic.decode_bytes(resolved, 100, 20) - traffic.weight_bytes_per_token(resolved)
    assert cache == traffic.kv_bytes(resolved, 110)
