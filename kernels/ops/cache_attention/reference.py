"""cache_attention in plain torch, row by row: the truth for tests and benchmarks."""

from __future__ import annotations

import torch


def cache_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, seq: torch.Tensor, slot: torch.Tensor, scale: float,
    start: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Arguments as of :func:`llmopt.ops.cache_attention.cache_attention`; the output is returned."""
    k = k if k_scale is None else k * k_scale[..., None]
    v = v if v_scale is None else v * v_scale[..., None]
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape[0], q.shape[1], q.shape[2])
    for t, (s, last) in enumerate(zip(seq.tolist(), slot.tolist(), strict=True)):
        seen = slice(0 if start is None else int(start[s]), last + 1)
        keys, values = (x[s, :, seen].float().repeat_interleave(group, 0) for x in (k, v))
        scores = torch.einsum("hd,hnd->hn", q[t].float(), keys) * scale
        out[t] = torch.einsum("hn,hnd->hd", scores.softmax(-1), values)
    return out.flatten(1).to(q.dtype)
