"""rope_cache in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch

from llmopt.ops.fused_linear.reference import rms_norm


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Turn the first R values of each head of x ``[T, H, D]``; cos and sin are ``[T, R / 2]``."""
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    y = x.clone()
    y[..., first] = a * cos - b * sin
    y[..., second] = b * cos + a * sin
    return y


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8, and float32 scales ``[...]`` of heads x ``[..., D]``: symmetric, the largest value is 127."""
    top = x.float().abs().amax(-1)
    zero = top < 1e-30
    codes = x.float() * torch.where(zero, 0.0, 127.0 / top)[..., None]
    return codes.round().nan_to_num(0.0).clamp(-128, 127).to(torch.int8), torch.where(zero, 0.0, top / 127.0)


def rope_cache(
    qkv: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cos: torch.Tensor | None,
    sin: torch.Tensor | None, position: torch.Tensor | None, seq: torch.Tensor, slot: torch.Tensor,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 0.0,
    k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Arguments as of :func:`llmopt.ops.rope_cache.rope_cache`; q, k and v are written, and their scales."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], k.shape[3]
    queries, keys, values = qkv.view(-1, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
    queries, keys = rms_norm(queries, q_norm, eps), rms_norm(keys, k_norm, eps)
    if cos is not None and sin is not None and position is not None:
        rows = cos[position.long()], sin[position.long()]
        queries, keys = (rotate(x, *rows, interleaved=interleaved) for x in (queries, keys))
    q.copy_(queries)
    for x, cache, scales in ((keys, k, k_scale), (values, v, v_scale)):
        if scales is not None:
            x, scales[seq.long(), :, slot.long()] = quantize(x)
        cache[seq.long(), :, slot.long()] = x.to(cache.dtype)
