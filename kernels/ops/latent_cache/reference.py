"""latent_cache in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch

from llmopt.ops.int4_linear.reference import quantize_tokens
from llmopt.ops.latent_cache.rows import latent_codes
from llmopt.ops.latent_cache.weights import dense_weight, group_for


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """``[T, ..., P]`` rotated by the angles of its token, ``[T, P / 2]``; pairs stay where they are."""
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    a, b = pairs.unbind(-1 if interleaved else -2)
    cos, sin = (t.view(t.shape[0], *[1] * (x.dim() - 2), t.shape[1]) for t in (cos, sin))
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2).flatten(-2)


def heads_linear(x: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """``x [T, H, K] @ weight[h].T`` as ``[T, H, out_features]``; beside a packed weight x is quantized, as the kernels do."""
    tokens, heads, k = x.shape
    if weight.dtype == torch.uint8:
        x = quantize_tokens(x.reshape(tokens * heads, k), group_for(k)).view(tokens, heads, k)
    return torch.einsum("thk,hnk->thn", x.float(), dense_weight(weight, out_features, k))


def write_latents(
    kv_a: torch.Tensor, norm: torch.Tensor, *, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool, cache: torch.Tensor,
    latent_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """What :func:`llmopt.ops.latent_cache.latent_cache` writes into cache."""
    latent, rope = kv_a.tensor_split([norm.shape[0]], dim=1)
    latent = latent * torch.rsqrt(latent.square().mean(1, keepdim=True) + eps) * norm
    rope = rotate(rope, cos[position.long()], sin[position.long()], interleaved=interleaved)
    if latent_scale is None:
        cache[seq.long(), slot.long()] = torch.cat([latent, rope], dim=1).to(cache.dtype)
        return
    rows, scales = latent_codes(latent, rope)
    cache[seq.long(), slot.long()], latent_scale[seq.long(), slot.long()] = rows, scales


def latent_cache(
    q: torch.Tensor, kv_a: torch.Tensor, norm: torch.Tensor, *, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool, heads: int,
    w_uk: torch.Tensor | None, cache: torch.Tensor, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of :func:`llmopt.ops.latent_cache.latent_cache`; the cache stays as it is."""
    per_head = q.reshape(q.shape[0], heads, q.shape[1] // heads)
    rope = 2 * cos.shape[1]
    nope, rotated = per_head.split([per_head.shape[2] - rope, rope], dim=2)
    rotated = rotate(rotated, cos[position.long()], sin[position.long()], interleaved=interleaved)
    if w_uk is not None:
        nope = heads_linear(nope, w_uk, norm.shape[0])
    return torch.cat([nope, rotated], dim=2).to(cache.dtype if latent_scale is None else torch.bfloat16)
