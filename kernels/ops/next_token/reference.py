"""next_token in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch


def next_token(logits: torch.Tensor) -> torch.Tensor:
    """``[T]`` int64: the first largest of each row; a NaN is the largest."""
    return logits.argmax(-1)
