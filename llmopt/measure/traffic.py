"""Bytes that one decode step must read: the yardstick against the machine's read bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmopt.measure.report import Ceilings, Timing
from llmopt.models.base import ResolvedModel
from llmopt.runtime import screen
from llmopt.runtime.generate import engine_of


def weight_bytes_per_token(resolved: ResolvedModel) -> int:
    """Bytes of weights one token reads, as the model stands now: experts by the share chosen, embeddings one row, half of a
    head that is screened."""
    config: Any = resolved.model.config
    moe = resolved.family.moe
    chosen = config.num_experts_per_tok / getattr(config, moe.num_experts_key) if moe is not None else 1.0
    parent, attr = resolved.parent_of_embedding()
    embedding: nn.Module = getattr(parent, attr)
    head: nn.Module = getattr(resolved.head.parent, resolved.head.attr)
    experts = {id(m): m for layer in resolved.layers for m in _experts(layer)}
    inside_experts = {t.data_ptr() for m in experts.values() for t in (*m.parameters(), *m.buffers())}
    table = {t.data_ptr() for t in (*embedding.parameters(), *embedding.buffers())}
    head_tensors = {t.data_ptr() for t in (*head.parameters(), *head.buffers())}
    total, seen = 0.0, set[int]()
    engine = engine_of(resolved.model)
    if engine is not None:
        for module, size in engine.stand_ins():
            total += size
            seen |= {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
        seen |= {copy.data_ptr() for module in resolved.model.modules() for copy in _copies(module)}
    for tensor in (*resolved.model.parameters(), *resolved.model.buffers()):
        pointer = tensor.data_ptr()
        if pointer in seen or (pointer in table and pointer not in head_tensors):
            continue
        seen.add(pointer)
        size = tensor.numel() * tensor.element_size()
        total += size * chosen if pointer in inside_experts else size
    if engine is not None and engine.screens(1):
        total -= screen.bytes_spared(engine.head)
    return int(total)


def _copies(module: nn.Module) -> list[torch.Tensor]:
    """Matrices that passes keep beside the weights they were made from."""
    buffers = (module._buffers[name] for name in module._non_persistent_buffers_set)
    return [buffer for buffer in buffers if buffer is not None and buffer.dim() > 1]


def _experts(layer: Any) -> list[nn.Module]:
    if layer.experts is None:
        return []
    return [getattr(layer.experts.parent, layer.experts.attr)]


def kv_bytes(resolved: ResolvedModel, depth: int) -> int:
    """Bytes of the cache that one token reads at ``depth``, in the dtype of the caches that the model makes as it stands now;
    int8 with its scales."""
    config: Any = resolved.model.config
    engine = engine_of(resolved.model)
    dtype = resolved.dtype if engine is None else engine.kv_dtype
    if resolved.family.attention.kind == "mla":
        rope = config.qk_rope_head_dim * (2 if dtype == torch.int8 else 1)  # bfloat16 behind codes
        rows, values = 1, config.kv_lora_rank + rope
    else:
        rows = 2 * config.num_key_value_heads
        values = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return int(len(resolved.layers) * rows * (values * dtype.itemsize + scale) * depth)


def decode_bytes(resolved: ResolvedModel, prompt_tokens: int, decode_tokens: int) -> int:
    """Bytes a decode step reads, half-way through the tokens decoded after a prompt."""
    return weight_bytes_per_token(resolved) + kv_bytes(resolved, prompt_tokens + decode_tokens // 2)


def bandwidth_fraction(num_bytes: int, timing: Timing | None, ceilings: Ceilings | None) -> float | None:
    """Share of the measured read bandwidth at which decode reads ``num_bytes`` a token; None without both times."""
    if timing is None or ceilings is None or ceilings.read_gb_per_s is None:
        return None
    return num_bytes / (timing.decode_ms.value * 1e-3) / (ceilings.read_gb_per_s.value * 1e9)
