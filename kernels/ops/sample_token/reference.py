"""sample_token in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch


def sample_token(logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    """``[T]`` int64: the token drawn from each row; -1 where none can be."""
    drawn = [_row(x.double(), q.double(), *s.tolist()) for x, q, s in zip(logits, noise, settings, strict=True)]
    return torch.tensor(drawn, dtype=torch.int64)


def _row(x: torch.Tensor, noise: torch.Tensor, temperature: float, top_k: float, top_p: float, min_p: float) -> int:
    largest = x.max()
    if not largest.isfinite():
        return -1
    weight = ((x - largest) / temperature).exp() if temperature > 0 else (x == largest).double()
    kept = torch.ones_like(x, dtype=torch.bool)
    if 1 <= top_k < len(x):
        kept &= x >= x.topk(int(top_k)).values[-1]
    if top_p < 1:
        values, order = x[kept].sort(descending=True)
        mass = weight[kept][order]
        before = mass.cumsum(0) - mass
        count = max(1, int((before < top_p * mass.sum()).sum()))
        kept &= x >= values[count - 1]
    if min_p > 0:
        kept &= (weight >= min_p) | (x == largest)
    return int(torch.where(kept, weight / noise.clamp(min=1e-20), -1).argmax())
