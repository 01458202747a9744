"""A group of linears that share their input, on whichever implementation serves them: our op, or torch for many tokens."""

from __future__ import annotations

import torch
from torch.nn import functional

from llmopt.ops.fused_linear import Mode, Weight, fused_linear
from llmopt.runtime.program import only_ops

# tokens from which torch's matrix product beats our row-by-row loops on weights that are not packed
_TORCH_TOKENS = 24


def linears(
    x: torch.Tensor, weights: tuple[Weight, ...], out: torch.Tensor, *, norm: torch.Tensor | None = None,
    eps: float = 0.0, mode: Mode = "store",
) -> None:  # fmt: skip
    """:func:`llmopt.ops.fused_linear.fused_linear`, with plain weights and many tokens given to torch.

    Args:
        x: ``[T, K]``.
        weights: of in_features K.
        out: ``[T, N]`` float32.
        norm, eps, mode: see the op.
    """
    if all(w.packed for w in weights) or only_ops() or x.shape[0] < _TORCH_TOKENS:
        fused_linear(x, weights, out, norm=norm, eps=eps, mode=mode)
        return
    values = x.float() if norm is None else functional.rms_norm(x.float(), (x.shape[1],), norm, eps)
    if mode == "swiglu":
        gate, up = (_product(values, w) for w in weights)
        torch.mul(functional.silu(gate), up, out=out)
        return
    start = 0
    for weight in weights:
        part = out[:, start : start + weight.rows]
        start += weight.rows
        if weight.packed:
            fused_linear(values, (weight,), part, mode=mode)
        elif mode == "add":
            part += _product(values, weight)
        else:
            part.copy_(_product(values, weight))


def _product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    if weight.packed:
        out = torch.empty(x.shape[0], weight.rows, device=x.device)
        fused_linear(x, (weight,), out)
        return out
    bias = None if weight.bias is None else weight.bias.to(weight.data.dtype)
    return functional.linear(x.to(weight.data.dtype), weight.data, bias).float()
