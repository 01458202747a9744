"""latent_attention on NVIDIA GPUs: sixteen heads of a token and a part of its keys a program, which reads each row of the cache
once for keys and values; the last program of a token's heads puts the parts together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError
from llmopt.ops.cache_attention.triton_kernel import counter, further, part_of_keys, put_together, scored

_MOST_PARTS, _LEAST_KEYS = 64, 128
_LOG2E = 1.4426950408889634


@triton.jit
def _decode(
    query, cache, roped, scales, seq, slot, start, scale, out, part, stats, counters, heads, capacity, rank, rope, width,
    roped_width, roped_at, START: tl.constexpr, INT8: tl.constexpr, PARTS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    token, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    s, low, high = part_of_keys(seq, slot, start, token, split, START, PARTS, BLOCK_N)
    h, r, p = block * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    mine, row = h < heads, token * heads + h
    own = mine[:, None] & (r < rank)[None, :]
    at_query = query + row[:, None] * (rank + rope)
    nope = tl.load(at_query + r[None, :], mask=own, other=0.0)
    turned = tl.load(at_query + rank + p[None, :], mask=mine[:, None] & (p < rope)[None, :], other=0.0)
    base = s.to(tl.int64) * capacity
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    for at in range(low, high, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        seen = j < high
        rows = (base + j)[:, None]
        latents = tl.load(cache + rows * width + r[None, :], mask=seen[:, None] & (r < rank)[None, :], other=0)
        keys = tl.load(
            roped + rows * roped_width + roped_at + p[None, :], mask=seen[:, None] & (p < rope)[None, :], other=0.0
        )
        by = 1.0
        if INT8:
            latents = latents.to(tl.float32).to(nope.dtype)
            by = tl.load(scales + base + j, mask=seen, other=0.0)[None, :]
        scores = scored(nope, tl.trans(latents), scale, PRECISE) * by + scored(turned, tl.trans(keys), scale, PRECISE)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        m, total, acc = further(scores, latents, by, m, total, acc, PRECISE)
    if PARTS == 1:
        tl.store(out + row[:, None] * rank + r[None, :], acc / total[:, None], mask=own)
    else:
        slice_ = row * PARTS + split
        tl.store(part + slice_[:, None] * rank + r[None, :], acc, mask=own)
        tl.store(stats + slice_ * 2, m, mask=mine)
        tl.store(stats + slice_ * 2 + 1, total, mask=mine)
        tl.debug_barrier()
        count = counters + token * tl.num_programs(1) + block
        if tl.atomic_add(count, 1, sem="acq_rel") == PARTS - 1:
            put_together(part, stats, out, row, mine, own, r, rank, PARTS, BLOCK_H, BLOCK_R)
            tl.store(count, 0)


def run(
    query: torch.Tensor, cache: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, scale: float, rank: int,
    start: torch.Tensor | None = None, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of the torch op."""
    tokens, heads, size = query.shape
    rope, int8 = size - rank, latent_scale is not None
    width = rank + (2 if int8 else 1) * rope
    if cache.shape[2] != width or not cache.is_contiguous() or not query.is_contiguous():
        raise InputError.argument(
            "latent_attention: cache", expected=f"contiguous rows of {width}", got=tuple(cache.shape)
        )
    out = torch.empty(tokens, heads, rank, device=query.device)
    if tokens == 0:
        return out
    roped = cache.view(torch.bfloat16) if int8 else cache
    parts = min(_MOST_PARTS, triton.cdiv(cache.shape[1], _LEAST_KEYS))
    blocks = triton.cdiv(heads, 16)
    partial = torch.empty(tokens * heads * parts, rank if parts > 1 else 0, device=query.device)
    stats = torch.empty(tokens * heads * parts, 2, device=query.device)
    _decode[(tokens, blocks, parts)](
        query, cache, roped, latent_scale if int8 else stats, seq, slot, seq if start is None else start, scale * _LOG2E,
        out, partial, stats, counter(query.device, tokens * blocks), heads, cache.shape[1], rank, rope, width, roped.shape[2],
        rank // 2 if int8 else rank, start is not None, int8, parts, 16, max(16, triton.next_power_of_2(rank)),
        max(16, triton.next_power_of_2(rope)), 32, query.dtype == torch.float32, num_warps=8,
    )  # fmt: skip
    return out
