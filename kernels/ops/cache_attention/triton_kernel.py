"""cache_attention on NVIDIA GPUs.

Few tokens: a program takes the query heads of one key/value head and a part of the keys; the last of a token's programs to
finish puts the parts together ("flash decoding" in one launch). Many tokens: a program takes some rows of one head and all of
their keys (FlashAttention-2, Dao 2023, arXiv 2307.08691), sequence by sequence, since rows are ragged. How many keys a row
sees is known on the GPU alone, so that a recorded launch serves every step.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError
from llmopt.ops.triton_tiles import product

MOST_DECODE_TOKENS = 64
_MOST_PARTS, _LEAST_KEYS, MOST_COUNTERS = 32, 256, 1 << 16
_LOG2E = 1.4426950408889634


@triton.jit
def scored(q, k, scale, PRECISE: tl.constexpr):
    """``scale * q @ k``."""
    return product(q, k, tl.zeros((q.shape[0], k.shape[1]), tl.float32), PRECISE) * scale


@triton.jit
def further(scores, v, by, m, total, acc, PRECISE: tl.constexpr):
    """One block of keys more: running maximum, sum and values, each times its weight and ``by``; what is not seen scores -inf.
    Scores are of powers of two."""
    new = tl.maximum(m, tl.max(scores, 1))
    # rows that have seen no key yet stay at -inf, whose differences are not to be taken
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(m - base)
    acc = product((p * by).to(v.dtype), v, acc * shrink[:, None], PRECISE)
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def part_of_keys(seq, slot, start, token, split, START: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """A token's sequence, and the slots from ``low`` to below ``high`` that part ``split`` of its keys is."""
    s = tl.load(seq + token)
    first = tl.load(start + s) if START else s * 0
    end = tl.load(slot + token) + 1
    size = tl.cdiv(tl.cdiv(end - first, PARTS), BLOCK_N) * BLOCK_N
    low = first + split * size
    return s, low, tl.minimum(low + size, end)


@triton.jit
def _decode(
    q, k, v, k_scale, v_scale, seq, slot, start, scale, out, part, stats, counters, heads, kv_heads, capacity, dim,
    GROUP: tl.constexpr, START: tl.constexpr, INT8: tl.constexpr, PARTS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    token, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    s, low, high = part_of_keys(seq, slot, start, token, split, START, PARTS, BLOCK_N)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    row = token * heads + head * GROUP + g
    mine = g < GROUP
    own = mine[:, None] & (d < dim)[None, :]
    query = tl.load(q + row[:, None] * dim + d[None, :], mask=own, other=0.0)
    base = (s.to(tl.int64) * kv_heads + head) * capacity
    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for at in range(low, high, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        seen = j < high
        keys = tl.load(k + (base + j)[None, :] * dim + d[:, None], mask=seen[None, :] & (d < dim)[:, None], other=0)
        values = tl.load(v + (base + j)[:, None] * dim + d[None, :], mask=seen[:, None] & (d < dim)[None, :], other=0)
        if INT8:
            keys, values = keys.to(tl.float32).to(query.dtype), values.to(tl.float32).to(query.dtype)
        scores, by = scored(query, keys, scale, PRECISE), 1.0
        if INT8:
            scores *= tl.load(k_scale + base + j, mask=seen, other=0.0)[None, :]
            by = tl.load(v_scale + base + j, mask=seen, other=0.0)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        m, total, acc = further(scores, values, by, m, total, acc, PRECISE)
    if PARTS == 1:
        tl.store(out + row[:, None] * dim + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=own)
    else:
        slice_ = row * PARTS + split
        tl.store(part + slice_[:, None] * dim + d[None, :], acc, mask=own)
        tl.store(stats + slice_ * 2, m, mask=mine)
        tl.store(stats + slice_ * 2 + 1, total, mask=mine)
        tl.debug_barrier()
        done = tl.atomic_add(counters + token * kv_heads + head, 1, sem="acq_rel")
        if done == PARTS - 1:
            put_together(part, stats, out, row, mine, own, d, dim, PARTS, BLOCK_G, BLOCK_D)
            tl.store(counters + token * kv_heads + head, 0)


@triton.jit
def put_together(
    part, stats, out, row, mine, own, d, dim, PARTS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for split in range(PARTS):
        slice_ = row * PARTS + split
        other = tl.load(stats + slice_ * 2, mask=mine, other=float("-inf"))
        count = tl.load(stats + slice_ * 2 + 1, mask=mine, other=0.0)
        values = tl.load(part + slice_[:, None] * dim + d[None, :], mask=own, other=0.0)
        new = tl.maximum(m, other)
        base = tl.where(new == float("-inf"), 0.0, new)
        a, b = tl.exp2(m - base), tl.exp2(other - base)
        acc = acc * a[:, None] + values * b[:, None]
        total = total * a + count * b
        m = new
    tl.store(out + row[:, None] * dim + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=own)


@triton.jit
def _many(
    q, k, v, k_scale, v_scale, seq, slot, start, scale, out, tokens, heads, kv_heads, capacity, dim,
    GROUP: tl.constexpr, START: tl.constexpr, INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # the last rows see most keys: they begin first
    t = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, valid = tl.arange(0, BLOCK_D), t < tokens
    of = tl.load(seq + t, mask=valid, other=0)
    last = tl.load(slot + t, mask=valid, other=-1)
    first = tl.load(start + of, mask=valid, other=0) if START else last * 0
    own = valid[:, None] & (d < dim)[None, :]
    row = (t.to(tl.int64) * heads + head)[:, None] * dim + d[None, :]
    query = tl.load(q + row, mask=own, other=0.0)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for s in range(tl.min(tl.where(valid, of, 0x7FFFFFFF)), tl.max(of) + 1):
        mine = valid & (of == s)
        base = ((s + tl.full((), 0, tl.int64)) * kv_heads + head // GROUP) * capacity
        end = tl.max(tl.where(mine, last, -1)) + 1
        for at in range(tl.min(tl.where(mine, first, 0x7FFFFFFF)), end, BLOCK_N):
            j = at + tl.arange(0, BLOCK_N)
            here = (j < end)[None, :] & (d < dim)[:, None]
            keys = tl.load(k + (base + j)[None, :] * dim + d[:, None], mask=here, other=0)
            values = tl.load(v + (base + j)[:, None] * dim + d[None, :], mask=tl.trans(here), other=0)
            if INT8:
                keys, values = keys.to(tl.float32).to(query.dtype), values.to(tl.float32).to(query.dtype)
            scores, by = scored(query, keys, scale, PRECISE), 1.0
            if INT8:
                scores *= tl.load(k_scale + base + j, mask=j < end, other=0.0)[None, :]
                by = tl.load(v_scale + base + j, mask=j < end, other=0.0)[None, :]
            seen = mine[:, None] & (j[None, :] >= first[:, None]) & (j[None, :] <= last[:, None])
            m, total, acc = further(tl.where(seen, scores, float("-inf")), values, by, m, total, acc, PRECISE)
    total = tl.where(total == 0, 1.0, total)
    tl.store(out + row, (acc / total[:, None]).to(out.dtype.element_ty), mask=own)


@functools.cache
def _zeros(device: torch.device) -> torch.Tensor:
    return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)


def counter(device: torch.device, count: int) -> torch.Tensor:
    """Zeros, which every launch leaves as zeros: one launch at a time uses them, as launches of one stream do.

    Raises:
        InputError: more are wanted than there are.
    """
    if count > MOST_COUNTERS:
        raise InputError.argument("tokens times heads", expected=f"at most {MOST_COUNTERS} at once", got=count)
    return _zeros(device)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor,
    start: torch.Tensor | None, scale: float, out: torch.Tensor, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Arguments as of the torch op."""
    tokens, heads, dim = q.shape
    kv_heads, capacity = k.shape[1], k.shape[2]
    _check(q, k, v, out, k_scale, v_scale)
    if tokens == 0:
        return
    int8 = k_scale is not None
    shared = [
        q, k, v, k_scale if int8 else q, v_scale if int8 else q, seq, slot, seq if start is None else start,
        scale * _LOG2E, out,
    ]  # fmt: skip
    options = {
        "GROUP": heads // kv_heads, "START": start is not None, "INT8": int8, "PRECISE": q.dtype == torch.float32,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
    }  # fmt: skip
    if tokens > MOST_DECODE_TOKENS:
        block = 32 if dim > 128 or options["PRECISE"] else 64
        _many[(heads, triton.cdiv(tokens, block))](
            *shared, tokens, heads, kv_heads, capacity, dim, **options, BLOCK_M=block, BLOCK_N=32, num_warps=4,
        )  # fmt: skip
        return
    parts = min(_MOST_PARTS, triton.cdiv(capacity, _LEAST_KEYS))
    block = 16 if options["PRECISE"] else 32 if dim > 128 else 64
    partial = torch.empty(tokens * heads * parts, dim if parts > 1 else 0, device=q.device)
    stats = torch.empty(tokens * heads * parts, 2, device=q.device)
    _decode[(tokens, kv_heads, parts)](
        *shared, partial, stats, counter(q.device, tokens * kv_heads), heads, kv_heads, capacity, dim, **options,
        PARTS=parts, BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_N=block, num_warps=4,
    )  # fmt: skip


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    tokens, heads, dim = q.shape
    if k.shape != v.shape or k.shape[-1] != dim or heads % k.shape[1]:
        raise InputError.argument("cache_attention: k, v", expected=f"heads of {dim}", got=(*k.shape, *v.shape))
    if tuple(out.shape) != (tokens, heads * dim):
        raise InputError.argument("cache_attention: out", expected=f"{(tokens, heads * dim)}", got=tuple(out.shape))
    if (k.dtype == torch.int8) != (k_scale is not None and v_scale is not None):
        raise InputError("cache_attention: expected k_scale and v_scale of an int8 cache, and of no other")
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if not x.is_contiguous():
            raise InputError.argument(f"cache_attention: {name}", expected="contiguous", got=x.stride())
