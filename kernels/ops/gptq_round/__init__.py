"""gptq_round: the two loops GPTQ spends its time in, the scale search and the column by column rounding.

Used while quantizing. Without the compiled kernels the reference runs on the CPU: same results, many times slower.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.ops.device import implementation
from llmopt.ops.gptq_round import reference

__all__ = ["round_span", "search_scales"]


def search_scales(
    w: torch.Tensor, weight: torch.Tensor, *, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of one group by weighted squared error.

    Args:
        w: ``[b, N, s]`` float32.
        weight: ``[b, s]`` float32, importance of each column.
        bits: of the codes.
        symmetric: zero fixed at ``2**(bits-1)``; scales may then be negative.

    Returns:
        ``(scale, zero)``, each ``[b, N]`` float32; scales are float16 values and never 0.
    """
    return implementation("gptq_round", _search_on_cpu, w, "search_scales")(w, weight, bits=bits, symmetric=symmetric)


def round_span(
    w: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a span in order, spreading each error over the columns that follow.

    Args:
        w: ``[b, N, s]`` float32, s at most 128.
        u: ``[b, s, s]`` float32, the span's block of the upper Cholesky factor of the inverse Hessian.
        scale, zero: ``[b, N]`` float32.
        bits: of the codes.

    Returns:
        ``(codes, errors)``, each ``[b, N, s]`` float32; errors are divided by the factor's diagonal.
    """
    return implementation("gptq_round", _round_on_cpu, w, "round_span")(w, u, scale, zero, bits=bits)


def _search_on_cpu(
    w: torch.Tensor, weight: torch.Tensor, *, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not native.available():
        return reference.search_scales(w, weight, bits=bits, symmetric=symmetric)
    scale, zero = torch.empty(w.shape[:2]), torch.empty(w.shape[:2])
    native.library().gptq_search_scales(w.contiguous(), weight.contiguous(), scale, zero, bits, symmetric)
    return scale, zero


def _round_on_cpu(
    w: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if not native.available():
        return reference.round_span(w, u, scale, zero, bits=bits)
    q, error = torch.empty(w.shape), torch.empty(w.shape)
    native.library().gptq_round_span(
        w.contiguous(), u.contiguous(), scale.contiguous(), zero.contiguous(), q, error, bits
    )
    return q, error
