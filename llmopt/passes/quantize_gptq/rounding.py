"""Rounding weights to codes: the grids, the scale search, and plain round-to-nearest.

Letters: b batch (experts), N rows, K columns, g columns of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# candidate scales as shares of the one that just covers the largest weight
_SHRINKS = torch.linspace(1.0, 0.45, 45)


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes a weight may take: 0 .. 2**bits - 1, symmetric around 2**(bits-1) or with a zero point of its own."""

    bits: int
    symmetric: bool

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)


def to_codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest code of each weight, as float."""
    return (w / scale + zero).round_().clamp_(0, top)


def search_scales(w: torch.Tensor, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of one group by weighted mean squared error.

    Args:
        w: ``[b, N, g]`` float32.
        weight: ``[b, 1, g]`` importance of each column.
        grid: the codes.

    Returns:
        ``(scale, zero)``, each ``[b, N, 1]`` float32; the scale is representable in float16 and never 0.
    """
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    if grid.symmetric:
        reach = torch.maximum(-low, high)
        candidates = [(reach * s * sign) / (grid.top / 2) for s in _SHRINKS.tolist() for sign in (1.0, -1.0)]
        zero = torch.full_like(low, float(grid.middle))
        zeros = [zero] * len(candidates)
    else:
        candidates = [(high - low) * s / grid.top for s in _SHRINKS.tolist()]
        zeros = [(-low * s / c.clamp(min=1e-30)).round_().clamp_(0, grid.top) for s, c in
                 zip(_SHRINKS.tolist(), candidates, strict=True)]  # fmt: skip
    best_scale = torch.ones_like(low)
    best_zero = zeros[0].clone()
    best_error = torch.full_like(low, torch.inf)
    for candidate, zero in zip(candidates, zeros, strict=True):
        scale = to_float16_grid(candidate)
        error = ((to_codes(w, scale, zero, grid.top) - zero) * scale - w).square_().mul_(weight).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def to_float16_grid(scale: torch.Tensor) -> torch.Tensor:
    """Round to what the checkpoint can store; a group of zeros (or of values below float16) gets the smallest scale."""
    stored = scale.to(torch.float16).float()
    tiny = 2.0**-24
    return torch.where(stored == 0, torch.full_like(stored, tiny), stored)


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
            scale, zero = search_scales(block, torch.ones_like(block[:, :1]), grid)
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
