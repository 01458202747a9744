"""latent_attention in plain torch, token by token in float32."""

from __future__ import annotations

import torch

from llmopt.ops.latent_cache.rows import latent_parts


def latent_attention(
    query: torch.Tensor, cache: torch.Tensor, *, seq: torch.Tensor, slot: torch.Tensor, scale: float, rank: int,
    latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of :func:`llmopt.ops.latent_attention.latent_attention`."""
    cache = torch.cat([part.float() for part in latent_parts(cache, latent_scale, rank)], -1)
    out = query.new_zeros(query.shape[0], query.shape[1], rank, dtype=torch.float32)
    for token, (s, last) in enumerate(zip(seq.tolist(), slot.tolist(), strict=True)):
        keys = cache[s, : last + 1]
        out[token] = torch.softmax(query[token].float() @ keys.T * scale, dim=-1) @ keys[:, :rank]
    return out
