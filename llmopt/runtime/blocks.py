"""The halves of a decoder layer as calls of our ops: attention over the cache, and the MLP.

Each block holds its weights and adds its result to the residual stream ``h`` [T, H], float32, in place. It takes its buffers
from a workspace, so that a recorded step finds them where they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.errors import UnsupportedModelError
from llmopt.models.base import ModelFamily, ResolvedLayer
from llmopt.ops.cache_attention import cache_attention
from llmopt.ops.fused_linear import Weight
from llmopt.ops.rope_cache import rope_cache
from llmopt.runtime.cache import KVCache
from llmopt.runtime.linear import linears
from llmopt.runtime.rows import Rows
from llmopt.runtime.weights import norm_of, weight_of


class Workspace:
    """Buffers by name, made once: the next layer uses those of the one before, and fewer tokens those of more.

    Args:
        device: of the buffers.
        recorded: a program is recorded over them.
    """

    def __init__(self, device: torch.device | str = "cpu", *, recorded: bool = False) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self.device, self.recorded = device, recorded
        self._kept: list[torch.Tensor] = []

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, held as long as the workspace if a program is recorded over it."""
        if self.recorded:
            self._kept.append(tensor)
        return tensor

    def get(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer of this shape and dtype; its contents are whatever was there."""
        found = self._buffers.get(name)
        if found is not None and found.shape == shape and found.dtype == dtype:
            return found
        # a graph that is traced holds for any sizes, and must not compare them
        if found is not None and not torch.compiler.is_compiling():
            size = math.prod(shape)
            if found.numel() >= size and found.dtype == dtype:
                return found.view(-1)[:size].view(shape)
            self.keep(found)
        made = self._buffers[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return made


@dataclass(frozen=True, slots=True)
class Rope:
    """Tables of the rotary embedding, ``[positions, R / 2]`` float32."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Context:
    """What a block needs beside its weights and the residual stream."""

    rows: Rows
    cache: KVCache
    rope: Rope
    work: Workspace


class GqaBlock:
    """Grouped-query attention: norm and merged q/k/v, qk-norm with rope and cache write, attention, output with residual."""

    def __init__(self, layer: ResolvedLayer, family: ModelFamily, config: Any) -> None:
        attention: Any = layer.attention
        names = [name for stage in family.attention.stages for name in stage]
        self.qkv = tuple(weight_of(getattr(attention, n), f"{layer.name}.{n}") for n in names[:3])
        self.output = weight_of(getattr(attention, names[3]), f"{layer.name}.{names[3]}")
        self.index = layer.index
        self.norm, self.eps = norm_of(layer.input_norm)
        self.q_norm = self.k_norm = None
        self.head_eps = 0.0
        if family.attention.qk_norms:
            q_norm, k_norm = (getattr(attention, name) for name in family.attention.qk_norms)
            (self.q_norm, self.head_eps), (self.k_norm, _) = norm_of(q_norm), norm_of(k_norm)
        self.head_dim = int(attention.head_dim)
        self.heads = self.qkv[0].rows // self.head_dim
        self.kv_heads = self.qkv[1].rows // self.head_dim
        self.scale = float(attention.scaling)

    def run(self, h: torch.Tensor, ctx: Context) -> None:
        """``h += attention(norm(h))``, keys and values written to the cache."""
        tokens, work, dtype = h.shape[0], ctx.work, ctx.cache.query_dtype
        qkv = work.get("qkv", tokens, (self.heads + 2 * self.kv_heads) * self.head_dim)
        q = work.get("q", tokens, self.heads, self.head_dim, dtype=dtype)
        out = work.get("attention", tokens, self.heads * self.head_dim, dtype=dtype)
        keys, values, rows = ctx.cache.keys[self.index], ctx.cache.values[self.index], ctx.rows
        k_scale, v_scale = ctx.cache.scales(self.index)
        linears(h, self.qkv, qkv, norm=self.norm, eps=self.eps)
        rope_cache(
            qkv, q, keys, values, cos=ctx.rope.cos, sin=ctx.rope.sin, position=rows.position, seq=rows.seq,
            slot=rows.slot, interleaved=ctx.rope.interleaved, q_norm=self.q_norm, k_norm=self.k_norm,
            eps=self.head_eps, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        cache_attention(
            q, keys, values, out, seq=rows.seq, slot=rows.slot, start=ctx.cache.start, scale=self.scale,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        linears(out, (self.output,), h, mode="add")


class MlpBlock:
    """Gated MLP: norm and SwiGLU in one op, down projection with residual in another."""

    def __init__(self, layer: ResolvedLayer, family: ModelFamily) -> None:
        self.norm, self.eps = norm_of(layer.post_norm)
        self.gate_up, self.down = gated_weights(layer.mlp, family, layer.name)

    def run(self, h: torch.Tensor, ctx: Context) -> None:
        """``h += down(silu(gate(norm(h))) * up(norm(h)))``."""
        act = ctx.work.get("mlp", h.shape[0], self.gate_up[0].rows)
        linears(h, self.gate_up, act, norm=self.norm, eps=self.eps, mode="swiglu")
        linears(act, (self.down,), h, mode="add")


def gated_weights(mlp: Any, family: ModelFamily, name: str) -> tuple[tuple[Weight, ...], Weight]:
    """Gate and up, and down, of a gated MLP."""
    spec = family.mlp
    gate, up, down = (weight_of(getattr(mlp, part), f"{name}.{part}") for part in (spec.gate, spec.up, spec.down))
    if gate.bias is not None or up.bias is not None:
        raise UnsupportedModelError(f"{name}: an MLP with biases")
    return (gate, up), down
