"""exponential_noise in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch


def exponential_noise(out: torch.Tensor, generator: torch.Generator) -> None:
    """Fill ``out`` with values of the exponential distribution of rate 1."""
    out.exponential_(generator=generator)
