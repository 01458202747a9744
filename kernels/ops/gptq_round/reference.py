"""GPTQ's scale search and column loop in plain torch: the truth for tests, and what runs without compiled kernels.

Letters: b batch, N rows, s columns of a span or group.
"""

from __future__ import annotations

import torch

# candidate scales as shares of the one that just covers the largest weight
SHRINKS = tuple(1.0 - 0.55 * i / 44 for i in range(45))


def to_float16_grid(scale: torch.Tensor) -> torch.Tensor:
    """Round to what the checkpoint can store; a group of zeros (or of values below float16) gets the smallest scale."""
    stored = scale.to(torch.float16).float()
    return torch.where(stored == 0, torch.full_like(stored, 2.0**-24), stored)


def to_codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest code of each weight, as float."""
    return (w * torch.ones_like(scale).div(scale) + zero).round_().clamp_(0, top)


def search_scales(
    w: torch.Tensor, weight: torch.Tensor, *, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero ``[b, N]`` of one group ``w [b, N, s]`` by squared error weighted with ``weight [b, s]``."""
    top = 2**bits - 1
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    cover = (2 * torch.maximum(-low, high) if symmetric else high - low) / top
    zero = torch.full_like(low, float(2 ** (bits - 1)))
    if not symmetric:
        zero = (-low / cover.clamp(min=1e-30)).round_().clamp_(0, top)
    best_scale = torch.ones_like(low)
    best_error = torch.full_like(low, torch.inf)
    for share in SHRINKS:
        # a symmetric grid reaches one step further down than up, so the sign of the scale is a choice too
        for sign in (1.0, -1.0) if symmetric else (1.0,):
            scale = to_float16_grid(cover * (share * sign))
            difference = (to_codes(w, scale, zero, top) - zero) * scale - w
            error = difference.square_().mul_(weight[:, None]).sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
    return best_scale[..., 0], zero[..., 0]


def round_span(
    w: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scaled errors ``[b, N, s]`` of a span: each column's error is spread over the columns after it.

    ``u [b, s, s]`` is the span's block of the upper Cholesky factor of the inverse Hessian.
    """
    # [s, b, N]: each step then touches contiguous rows
    columns = w.permute(2, 0, 1).contiguous()
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i in range(columns.shape[0]):
        codes[i] = to_codes(columns[i], scale, zero, 2**bits - 1)
        errors[i] = (columns[i] - (codes[i] - zero) * scale) / u[:, i, i, None]
        columns[i + 1 :] -= u[:, i, i + 1 :].T[:, :, None] * errors[i]
    return codes.permute(1, 2, 0), errors.permute(1, 2, 0)
