"""GPTQ (Frantar et al. 2022, arXiv 2210.17323), batched over experts. Maths only: tensors in, codes out.

Columns are rounded one after the other; the error of each is spread over those not yet rounded, along the inverse Hessian
of the layer's inputs. Three departures from the paper's program:
- Columns are visited by importance (diagonal of the Hessian), groups by their mean importance and columns inside their
  group, while every column stays in its own contiguous group: most of what ``desc_act`` gains, and no permutation at run
  time.
- A group's scale minimises the error weighted by 1 / U_ii**2, the loss GPTQ itself charges for column i; scales are
  float16 values before any weight is rounded, so that the stored checkpoint is what was optimised.
- What is rounded is not W but the weights that, on the inputs the quantized model gives, come closest to what W makes of
  the inputs the exact model gives (GPTAQ, Li et al. 2025, arXiv 2504.02692, as one regression before the rounding).

Letters: b batch, N rows, K columns, G groups; H Hessian, U upper Cholesky factor of its inverse.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from llmopt.errors import QuantizationError
from llmopt.ops.gptq_round import round_span, search_scales
from llmopt.passes.quantize_gptq.rounding import Grid, check_weight

# columns rounded between two updates of everything that follows; also the paper's
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Solution:
    """Codes of a batch of weights, original column order."""

    q: torch.Tensor  # [b, N, K] uint8
    scales: torch.Tensor  # [b, N, G] float16
    zeros: torch.Tensor | None  # [b, N, G] uint8
    loss: torch.Tensor  # [b] sum over rows of (w - dq) H (w - dq), mean over tokens
    damp: float  # share of the mean diagonal that was added

    def dequantized(self, group_size: int) -> torch.Tensor:
        """``[b, N, K]`` float32."""
        size = self.q.shape[-1] if group_size == -1 else group_size
        k = self.q.shape[-1]
        scale = self.scales.float().repeat_interleave(size, -1)[..., :k]
        zero = 8.0 if self.zeros is None else self.zeros.float().repeat_interleave(size, -1)[..., :k]
        return (self.q.float() - zero) * scale


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor | None = None, *, grid: Grid, group_size: int,
    damp: float, name: str,
) -> Solution:  # fmt: skip
    """Quantize weights so that their outputs on the calibration inputs change least.

    Args:
        weight: ``[b, N, K]`` any floating dtype.
        hessian: ``[b, K, K]`` float32, mean of x x^T over the inputs.
        drift: ``[b, K, K]`` float32, mean of (exact input - x) x^T; None: the inputs are as they should be.
        grid: the codes.
        group_size: columns of a group (the last may be short), -1 for one group a row.
        damp: share of the mean diagonal added to the diagonal; raised tenfold, up to 1, while a factorisation fails.
        name: of the layer, for errors.

    Raises:
        QuantizationError: weights or Hessian hold NaN or Inf, weights need scales beyond float16, or no damping makes
            the Hessian positive definite.
    """
    w = weight.float().clone()
    check_weight(w, grid, name)
    if not torch.isfinite(hessian).all():
        raise QuantizationError(f"{name}: Hessian holds NaN or Inf (the layer's calibration inputs overflow)")
    order = _visiting_order(hessian, group_size)
    w = torch.gather(w, 2, order[:, None, :].expand_as(w))
    h = torch.gather(hessian, 1, order[:, :, None].expand_as(hessian))
    h = torch.gather(h, 2, order[:, None, :].expand_as(h))
    u, used = _inverse_factor(h, damp, name)
    if drift is not None:
        d = torch.gather(drift, 1, order[:, :, None].expand_as(drift))
        d = torch.gather(d, 2, order[:, None, :].expand_as(d))
        # the inverse Hessian is u^T u
        w += w @ d @ u.transpose(1, 2) @ u
    target = w.clone()
    q, scales, zeros, groups = _round_columns(w, u, grid, order, group_size)
    difference = target - _expand(q, scales, zeros, groups)
    loss = (difference @ h).mul_(difference).sum((1, 2))
    back = torch.argsort(order, dim=1)
    q = torch.gather(q, 2, back[:, None, :].expand_as(q)).to(torch.uint8)
    return Solution(q, scales.to(torch.float16), None if grid.symmetric else zeros.to(torch.uint8), loss, used)


def _visiting_order(hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[b, K]``: groups by falling mean diagonal, columns of a group by falling diagonal. Groups stay whole."""
    diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
    batch, k = diagonal.shape
    size = k if group_size == -1 else group_size
    columns = torch.arange(k, device=hessian.device)
    group_of = columns // size
    num_groups = int(group_of[-1]) + 1
    sums = torch.zeros(batch, num_groups, device=hessian.device).index_add_(1, group_of, diagonal)
    means = sums / torch.bincount(group_of, minlength=num_groups)
    # stable sorts, the finer key first, leave columns ordered inside groups ordered by importance
    by_column = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    rank = torch.argsort(torch.argsort(means, dim=1, descending=True, stable=True), dim=1)
    rank_of_column = torch.gather(rank, 1, group_of[by_column.reshape(-1)].reshape(batch, k))
    return torch.gather(by_column, 1, torch.argsort(rank_of_column, dim=1, stable=True))


def _inverse_factor(h: torch.Tensor, damp: float, name: str) -> tuple[torch.Tensor, float]:
    diagonal = torch.diagonal(h, dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # an input that is always zero says nothing about its column: any positive curvature leaves it to rounding
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    dead = diagonal == 0
    share = damp
    while True:
        damped = h.clone()
        torch.diagonal(damped, dim1=1, dim2=2).add_(share * mean + dead * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not info.any() and torch.isfinite(upper).all():
                return upper, share
        if share >= 1.0:
            raise QuantizationError(f"{name}: Hessian is not positive definite even with damping {share:g}")
        share = min(max(share * 10, 1e-4), 1.0)


def _round_columns(
    w: torch.Tensor, u: torch.Tensor, grid: Grid, order: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round in visiting order. Returns codes ``[b, N, K]``, scales and zeros ``[b, N, G]``, group of each column ``[b, K]``."""
    batch, n, k = w.shape
    size = k if group_size == -1 else group_size
    groups = order // size
    num_groups = -(-k // size)
    importance = torch.diagonal(u, dim1=1, dim2=2).pow(-2)
    q = torch.empty_like(w)
    scales, zeros = (torch.empty(batch, n, num_groups, device=w.device) for _ in range(2))
    for start, end in _spans(groups, size, k):
        # experts of a batch visit their groups in different orders, and a short last group comes at different places:
        # spans are cut so that within one all members stay inside one group each
        group = groups[:, start]
        fresh = groups[:, start - 1] != group if start else torch.ones_like(group, dtype=torch.bool)
        if fresh.any():
            last = min(start + size, k)
            inside = groups[:, start:last] == group[:, None]
            found = search_scales(
                w[:, :, start:last] * inside[:, None, :], importance[:, start:last] * inside, bits=grid.bits,
                symmetric=grid.symmetric,
            )  # fmt: skip
            for b in torch.nonzero(fresh).flatten().tolist():
                scales[b, :, group[b]], zeros[b, :, group[b]] = found[0][b], found[1][b]
        index = group[:, None, None].expand(batch, n, 1)
        scale, zero = torch.gather(scales, 2, index)[..., 0], torch.gather(zeros, 2, index)[..., 0]
        q[:, :, start:end], errors = round_span(
            w[:, :, start:end], u[:, start:end, start:end], scale, zero, bits=grid.bits
        )
        w[:, :, end:] -= errors @ u[:, start:end, end:]
    return q, scales, zeros, groups


def _spans(groups: torch.Tensor, size: int, k: int) -> list[tuple[int, int]]:
    """Cut 0..k wherever any member of the batch enters another group, and at least every _BLOCK columns."""
    changes = (groups[:, 1:] != groups[:, :-1]).any(0).nonzero().flatten() + 1
    cuts = [0, *changes.tolist(), k]
    spans = []
    for a, b in itertools.pairwise(cuts):
        spans += [(s, min(s + _BLOCK, b)) for s in range(a, b, _BLOCK)]
    return spans


def _expand(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    index = groups[:, None, :].expand_as(q)
    return (q - torch.gather(zeros, 2, index)) * torch.gather(scales, 2, index)
