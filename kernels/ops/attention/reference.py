"""attention in plain torch: the whole score matrix in float32. The source of truth for tests and benchmarks."""

from __future__ import annotations

import torch


def visible(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[B or 1, 1 or H, Tq, Tk]`` bool: which query may see which key."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    key = torch.arange(num_keys)
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    seen = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
    if key_mask is not None:
        seen = seen & key_mask.bool()[:, None, None, :]
    if mask is not None:
        seen = seen & mask.bool()
    return seen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as of :func:`llmopt.ops.attention.attention`."""
    group = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(group, 1).transpose(2, 3)
    if q_rope is not None and k_rope is not None:
        rope = k_rope.float().repeat_interleave(q.shape[1] // k_rope.shape[1], 1)
        scores = scores + q_rope.float() @ rope.transpose(2, 3)
    seen = visible(q, k, causal=causal, window=window, key_mask=key_mask, mask=mask)
    weights = torch.softmax((scores * scale).masked_fill(~seen, float("-inf")), dim=-1)
    # a softmax over nothing is NaN; such a row is zero by definition
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    out = weights @ v.float().repeat_interleave(group, 1)
    return out.transpose(1, 2).contiguous().to(q.dtype)
