"""latent_cache on NVIDIA GPUs: a kernel writes latents and rotates, a batched product takes queries into latent space."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError
from llmopt.ops.fused_linear.triton_kernel import dequantize
from llmopt.ops.latent_cache.weights import group_for
from llmopt.ops.rope_cache.triton_kernel import int8_codes


@triton.jit
def _turned(x, at, c, s, i, half, INTERLEAVED: tl.constexpr):
    """The pairs of a rotary part at ``at``, rotated: both values of pair i, and their places."""
    first = 2 * i if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else i + half
    a = tl.load(x + at + first, mask=i < half, other=0.0).to(tl.float32)
    b = tl.load(x + at + second, mask=i < half, other=0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s, first, second


@triton.jit
def _latents(
    kv_a, norm, eps, cos, sin, position, seq, slot, cache, roped, scales, kv_stride, rank, half, capacity, width,
    roped_width, INTERLEAVED: tl.constexpr, INT8: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A token's latent and rotary key into the cache; ``roped``: the cache in the rotary key's dtype."""
    token = tl.program_id(0).to(tl.int64)
    r, i = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    row = tl.load(seq + token).to(tl.int64) * capacity + tl.load(slot + token)
    x = tl.load(kv_a + token * kv_stride + r, mask=r < rank, other=0.0)
    x *= 1.0 / tl.sqrt(tl.sum(x * x) / rank + eps)
    x *= tl.load(norm + r, mask=r < rank, other=0.0)
    if INT8:
        codes, scale = int8_codes(x)
        tl.store(scales + row, scale)
        tl.store(cache + row * width + r, codes, mask=r < rank)
        behind = row * roped_width + rank // 2
    else:
        tl.store(cache + row * width + r, x.to(cache.dtype.element_ty), mask=r < rank)
        behind = row * roped_width + rank
    table = tl.load(position + token).to(tl.int64) * half + i
    c = tl.load(cos + table, mask=i < half, other=1.0)
    s = tl.load(sin + table, mask=i < half, other=0.0)
    a, b, first, second = _turned(kv_a, token * kv_stride + rank, c, s, i, half, INTERLEAVED)
    tl.store(roped + behind + first, a.to(roped.dtype.element_ty), mask=i < half)
    tl.store(roped + behind + second, b.to(roped.dtype.element_ty), mask=i < half)


@triton.jit
def _queries(
    q, cos, sin, position, query, q_stride, nope, half, out_nope, INTERLEAVED: tl.constexpr, COPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A head's rotary part behind its other one, which is copied too where ``COPY``."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_P)
    out = query + (token * tl.num_programs(1) + head) * (out_nope + 2 * half)
    at = token * q_stride + head * (nope + 2 * half)
    table = tl.load(position + token).to(tl.int64) * half + i
    c = tl.load(cos + table, mask=i < half, other=1.0)
    s = tl.load(sin + table, mask=i < half, other=0.0)
    a, b, first, second = _turned(q, at + nope, c, s, i, half, INTERLEAVED)
    tl.store(out + out_nope + first, a.to(query.dtype.element_ty), mask=i < half)
    tl.store(out + out_nope + second, b.to(query.dtype.element_ty), mask=i < half)
    if COPY:
        n = tl.arange(0, BLOCK_N)
        tl.store(out + n, tl.load(q + at + n, mask=n < nope).to(query.dtype.element_ty), mask=n < nope)


def heads_linear(x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
    """``x [T, H, K] @ weight[h].T`` as ``[T, H, rows]`` float32; a packed weight is dequantized for it."""
    heads, k = weight.shape[0], x.shape[2]
    if weight.dtype == torch.uint8:
        options = {"in_features": k, "group_size": group_for(k), "bits": 8, "asymmetric": False}
        weight = dequantize(weight, out_features=rows, **options)  # type: ignore[arg-type]
    y = torch.bmm(x.transpose(0, 1).to(weight.dtype), weight.view(heads, rows, k).transpose(1, 2))
    return y.transpose(0, 1).float()


def run(
    q: torch.Tensor, kv_a: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool, heads: int,
    w_uk: torch.Tensor | None, cache: torch.Tensor, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of the torch op."""
    tokens, half, rank, int8 = q.shape[0], cos.shape[1], norm.shape[0], latent_scale is not None
    nope = q.shape[1] // heads - 2 * half
    width = rank + (4 if int8 else 2) * half
    if kv_a.shape[1] != rank + 2 * half or cache.shape[2] != width or not cache.is_contiguous():
        raise InputError.argument("latent_cache: cache", expected=f"contiguous rows of {width}", got=tuple(cache.shape))
    if int8 != (cache.dtype == torch.int8) or q.stride(1) != 1 or kv_a.stride(1) != 1:
        raise InputError("latent_cache: expected dense rows, and latent_scale of an int8 cache and of no other")
    absorbed = nope if w_uk is None else rank
    query = torch.empty(
        tokens, heads, absorbed + 2 * half, dtype=torch.bfloat16 if int8 else cache.dtype, device=q.device
    )
    if tokens == 0:
        return query
    roped = cache.view(torch.bfloat16) if int8 else cache
    block_p = triton.next_power_of_2(half)
    _latents[(tokens,)](
        kv_a, norm, eps, cos, sin, position, seq, slot, cache, roped, latent_scale if int8 else norm, kv_a.stride(0), rank,
        half, cache.shape[1], width, roped.shape[2], interleaved, int8, triton.next_power_of_2(rank), block_p, num_warps=4,
    )  # fmt: skip
    _queries[(tokens, heads)](
        q, cos, sin, position, query, q.stride(0), nope, half, absorbed, interleaved, w_uk is None,
        triton.next_power_of_2(nope), block_p, num_warps=1,
    )  # fmt: skip
    if w_uk is not None:
        per_head = q.unflatten(1, (heads, -1))[..., :nope]
        query[..., :rank].copy_(heads_linear(per_head, w_uk, rank))
    return query
