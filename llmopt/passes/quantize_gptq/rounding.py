"""Rounding weights to codes: the grid, and plain round-to-nearest.

Letters: b batch (experts), N rows, K columns, g columns of one group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llmopt.errors import QuantizationError
from llmopt.ops.gptq_round import search_scales
from llmopt.ops.gptq_round.reference import to_codes, to_float16_grid


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes a weight may take: 0 .. 2**bits - 1, symmetric around 2**(bits-1) or with a zero point of its own."""

    bits: int
    symmetric: bool

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


def check_weight(w: torch.Tensor, grid: Grid, name: str) -> None:
    """Raises QuantizationError, naming the layer, if ``w`` holds NaN or Inf, or needs scales that float16 cannot hold."""
    largest = float(w.abs().max())
    if not math.isfinite(largest):
        raise QuantizationError(f"{name}: weight holds NaN or Inf")
    limit = torch.finfo(torch.float16).max * (grid.middle - 1)
    if largest > limit:
        raise QuantizationError(
            f"{name}: weight of {largest:.3g} needs a scale beyond float16 (weights up to {limit:.3g})"
        )


def round_to_nearest(
    w: torch.Tensor, grid: Grid, group_size: int, *, search: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize without looking at any input.

    Args:
        w: ``[..., N, K]``.
        grid: the codes.
        group_size: columns of a group; the last may be short. -1: one group a row.
        search: pick each group's scale by mean squared error rather than by its largest weight.

    Returns:
        ``(q [..., N, K] uint8, scales [..., N, G] float16, zeros [..., N, G] uint8 or None)``.
    """
    *lead, n, k = w.shape
    size = k if group_size == -1 else group_size
    flat = w.reshape(-1, n, k).float()
    codes, scales, zeros = [], [], []
    for start in range(0, k, size):
        block = flat[..., start : start + size]
        if search:
            weight = torch.ones(block.shape[0], block.shape[2], device=block.device)
            found = search_scales(block, weight, bits=grid.bits, symmetric=grid.symmetric)
            scale, zero = found[0][..., None], found[1][..., None]
        else:
            scale, zero = _covering(block, grid)
        codes.append(to_codes(block, scale, zero, grid.top).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    q = torch.cat(codes, -1).reshape(*lead, n, k)
    all_scales = torch.cat(scales, -1).to(torch.float16).reshape(*lead, n, -1)
    all_zeros = None if grid.symmetric else torch.cat(zeros, -1).to(torch.uint8).reshape(*lead, n, -1)
    return q, all_scales, all_zeros


def _covering(block: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = block.amin(-1, keepdim=True).clamp(max=0), block.amax(-1, keepdim=True).clamp(min=0)
    if grid.symmetric:
        # int8 has room to spare: 127 codes either side lose less than clipping the largest weight would
        steps = grid.top / 2 if grid.bits < 8 else float(grid.middle - 1)
        scale = to_float16_grid(torch.maximum(-low, high) / steps)
        return scale, torch.full_like(scale, float(grid.middle))
    scale = to_float16_grid((high - low) / grid.top)
    return scale, (-low / scale).round_().clamp_(0, grid.top)
