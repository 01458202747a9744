"""A decode step in plain torch: norms, rotary embedding, residuals and activations around the heavy ops of ours.

This is what is compiled where fuse_kernels is off. Each function takes one half of a decoder layer, as the engine holds it,
and gives the new residual stream; only the KV cache is written in place. Products, attention over the cache and the experts
are calls of ops, everything else is for a compiler to fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from llmopt.ops.cache_attention import cache_attention
from llmopt.ops.fused_linear import Weight, fused_linear
from llmopt.ops.latent_attention import latent_attention
from llmopt.ops.latent_cache import latent_cache
from llmopt.ops.latent_output import latent_output
from llmopt.ops.rope_cache import rope_cache
from llmopt.runtime.blocks import Context, GqaBlock, MlpBlock
from llmopt.runtime.latent import LatentBlock
from llmopt.runtime.moe import MoeBlock

Half = GqaBlock | LatentBlock | MlpBlock | MoeBlock


def run(half: Half, h: torch.Tensor, ctx: Context) -> torch.Tensor:
    """``h + half(norm(h))`` [T, H] float32, of one half of a decoder layer."""
    return _RUN[type(half)](half, h, ctx)


def gqa(block: GqaBlock, h: torch.Tensor, ctx: Context) -> torch.Tensor:
    """Grouped-query attention."""
    tokens, rows = h.shape[0], ctx.rows
    keys, values = ctx.cache.keys[block.index], ctx.cache.values[block.index]
    k_scale, v_scale = ctx.cache.scales(block.index)
    qkv = _products(_norm(h, block.norm, block.eps), block.qkv)
    q, k, v = qkv.view(tokens, -1, block.head_dim).split([block.heads, block.kv_heads, block.kv_heads], dim=1)
    if block.q_norm is not None and block.k_norm is not None:
        q, k = _norm(q, block.q_norm, block.head_eps), _norm(k, block.k_norm, block.head_eps)
    cos, sin = (table.index_select(0, rows.position)[:, None] for table in (ctx.rope.cos, ctx.rope.sin))
    q, k = (_rotated(x, cos, sin, ctx.rope.interleaved) for x in (q, k))
    query = torch.empty(tokens, block.heads, block.head_dim, dtype=ctx.cache.query_dtype, device=h.device)
    # rotated already: the op only writes to the cache, and brings the query into the cache's dtype
    rope_cache(
        torch.cat([q, k, v], 1).view(tokens, -1), query, keys, values, cos=None, sin=None, position=None,
        seq=rows.seq, slot=rows.slot, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    out = torch.empty(tokens, block.heads * block.head_dim, dtype=query.dtype, device=h.device)
    cache_attention(
        query, keys, values, out, seq=rows.seq, slot=rows.slot, start=ctx.cache.start, scale=block.scale,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    return h + _products(out, (block.output,))


def latent(block: LatentBlock, h: torch.Tensor, ctx: Context) -> torch.Tensor:
    """Multi-head latent attention, absorbed."""
    rows, (cache, scales) = ctx.rows, ctx.cache.latents(block.index)
    both = _products(_norm(h, block.norm, block.eps), (block.q, block.kv_a))
    q, kv_a = both[:, : block.q.rows], both[:, block.q.rows :]
    if block.q_b is not None:
        q = _products(_norm(q, block.q_norm, block.q_eps), (block.q_b,))
    w_uk, w_uv = block.halves()
    query = latent_cache(
        q, kv_a, block.kv_norm, eps=block.kv_eps, cos=ctx.rope.cos, sin=ctx.rope.sin, position=rows.position,
        seq=rows.seq, slot=rows.slot, interleaved=ctx.rope.interleaved, heads=block.heads, w_uk=w_uk, cache=cache,
        latent_scale=scales,
    )  # fmt: skip
    seen = latent_attention(
        query, cache, seq=rows.seq, slot=rows.slot, scale=block.scale, rank=block.rank, start=ctx.cache.start,
        latent_scale=scales,
    )  # fmt: skip
    return h + _products(latent_output(seen, w_uv, v_dim=block.v_dim), (block.output,))


def mlp(block: MlpBlock, h: torch.Tensor, ctx: Context) -> torch.Tensor:
    """Gated MLP."""
    gate, up = _products(_norm(h, block.norm, block.eps), block.gate_up).chunk(2, dim=1)
    return h + _products(functional.silu(gate) * up, (block.down,))


def experts(block: MoeBlock, h: torch.Tensor, ctx: Context) -> torch.Tensor:
    """Mixture of experts, with its norm and router: one op, into ``h`` itself."""
    block.run(h, ctx)
    return h


def final_norm(norm: tuple[torch.Tensor, float], h: torch.Tensor, ctx: Context) -> torch.Tensor:
    """The norm before the head."""
    return _norm(h, *norm)


def head(x: torch.Tensor, weight: Weight, out: torch.Tensor) -> None:
    """``out[T, V] = x @ weight.T``, of normalized hidden states."""
    fused_linear(x, (weight,), out)


_RUN: dict[type, Callable[[Any, torch.Tensor, Context], torch.Tensor]] = {
    GqaBlock: gqa, LatentBlock: latent, MlpBlock: mlp, MoeBlock: experts,
}  # fmt: skip


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def _products(x: torch.Tensor, weights: tuple[Weight, ...]) -> torch.Tensor:
    """Linears of one input, side by side."""
    out = torch.empty(x.shape[0], sum(w.rows for w in weights), device=x.device)
    fused_linear(x, weights, out)
    return out


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``x`` [T, H, D] with its first R values rotated; cos and sin ``[T, 1, R / 2]``."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
