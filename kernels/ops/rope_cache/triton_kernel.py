"""rope_cache on NVIDIA GPUs: a program takes one head of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError


@triton.jit
def int8_codes(x):
    """Codes of one head, and their scale: the largest value is 127; NaN where a value is."""
    known = tl.max((x != x).to(tl.int32)) == 0
    top = tl.max(tl.abs(x))
    scaled = x * tl.where(top < 1e-30, 0.0, 127.0 / top)
    # adding this rounds to the nearest whole number, halves to even ones
    codes = (scaled + 12582912.0) - 12582912.0
    codes = tl.where(known & (codes == codes), codes, 0.0)
    scale = tl.where(top < 1e-30, 0.0, top / 127.0)
    return codes.to(tl.int8), tl.where(known, scale, float("nan"))


@triton.jit
def _put(x, cache, scales, row, dim, d, INT8: tl.constexpr):
    """One head into row ``row`` of the cache, as codes with a scale where the cache is int8."""
    if INT8:
        codes, scale = int8_codes(x)
        tl.store(scales + row, scale)
        tl.store(cache + row * dim + d, codes, mask=d < dim)
    else:
        tl.store(cache + row * dim + d, x.to(cache.dtype.element_ty), mask=d < dim)


@triton.jit
def _rope_cache(
    qkv, q_norm, k_norm, eps, cos, sin, position, seq, slot, q, k, v, k_scale, v_scale, qkv_stride, heads, kv_heads,
    capacity, dim, half, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    INT8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    at = qkv + token * qkv_stride + head * dim
    x = tl.load(at + d, mask=d < dim, other=0.0).to(tl.float32)
    of_keys = head < heads + kv_heads
    kv_head = head - heads - tl.where(of_keys, 0, kv_heads)
    row = (tl.load(seq + token).to(tl.int64) * kv_heads + kv_head) * capacity + tl.load(slot + token)
    if not of_keys:
        _put(x, v, v_scale, row, dim, d, INT8)
    else:
        # the value that each is turned with, and which way
        turned = d < 2 * half
        if INTERLEAVED:
            other, angle, sign = d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            other, angle = tl.where(d < half, d + half, d - half), d % half
            sign = tl.where(d < half, -1.0, 1.0)
        other = tl.where(turned & ROPE, other, d)
        y = tl.load(at + other, mask=d < dim, other=0.0).to(tl.float32)
        if (head < heads and Q_NORM) or (head >= heads and K_NORM):
            weight = q_norm if head < heads else k_norm
            by = 1.0 / tl.sqrt(tl.sum(x * x) / dim + eps)
            x *= by * tl.load(weight + d, mask=d < dim, other=0.0)
            y *= by * tl.load(weight + other, mask=d < dim, other=0.0)
        if ROPE:
            table = tl.load(position + token).to(tl.int64) * half + angle
            c = tl.load(cos + table, mask=turned, other=1.0)
            s = tl.load(sin + table, mask=turned, other=0.0)
            x = tl.where(turned, x * c + sign * y * s, x)
        if head < heads:
            tl.store(q + (token * heads + head) * dim + d, x.to(q.dtype.element_ty), mask=d < dim)
        else:
            _put(x, k, k_scale, row, dim, d, INT8)


def run(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, cos: torch.Tensor | None,
    sin: torch.Tensor | None, position: torch.Tensor | None, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Arguments as of the torch op."""
    tokens, heads, dim = q.shape
    kv_heads, capacity = k.shape[1], k.shape[2]
    width = (heads + 2 * kv_heads) * dim
    if tuple(qkv.shape) != (tokens, width) or qkv.stride(1) != 1:
        raise InputError.argument("rope_cache: qkv", expected=f"{(tokens, width)}", got=tuple(qkv.shape))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_contiguous() or x.shape[-1] != dim:
            raise InputError.argument(f"rope_cache: {name}", expected=f"contiguous, heads of {dim}", got=tuple(x.shape))
    if (k.dtype == torch.int8) != (k_scale is not None and v_scale is not None):
        raise InputError("rope_cache: expected k_scale and v_scale of an int8 cache, and of no other")
    if tokens == 0:
        return

    def given(x: torch.Tensor | None) -> torch.Tensor:
        return qkv if x is None else x

    _rope_cache[(tokens, heads + 2 * kv_heads)](
        qkv, given(q_norm), given(k_norm), eps, given(cos), given(sin), given(position), seq, slot, q, k, v,
        given(k_scale), given(v_scale), qkv.stride(0), heads, kv_heads, capacity, dim,
        0 if cos is None else cos.shape[1], q_norm is not None, k_norm is not None, cos is not None, interleaved,
        k.dtype == torch.int8, triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
