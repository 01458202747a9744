"""fused_linear in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmopt.ops.fused_linear import Mode, Weight
from llmopt.ops.int4_linear import layout
from llmopt.ops.int4_linear.reference import quantize_tokens


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32; x itself where there is no weight."""
    x = x.float()
    if weight is None:
        return x
    # one division, then two products a value, as the kernels do it: the codes of a quantized token then agree
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1] + eps
    return x * torch.ones_like(mean).div(mean.sqrt()) * weight


def dequantize(weight: Weight) -> torch.Tensor:
    """``[rows, cols]`` float32."""
    if not weight.packed:
        return weight.data.float()
    return layout.dequantize(
        weight.data, out_features=weight.rows, in_features=weight.cols, group_size=weight.group_size,
        bits=weight.bits, asymmetric=weight.asymmetric,
    )  # fmt: skip


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """One weight's ``x @ weight.T + bias``; tokens are quantized for a packed weight."""
    y = (quantize_tokens(x, weight.group_size) if weight.packed else x) @ dequantize(weight).T
    return y if weight.bias is None else y + weight.bias


def fused_linear(
    x: torch.Tensor, weights: Sequence[Weight], out: torch.Tensor, *, norm: torch.Tensor | None = None,
    eps: float = 0.0, mode: Mode = "store",
) -> torch.Tensor:  # fmt: skip
    """Arguments as of :func:`llmopt.ops.fused_linear.fused_linear`; what ``out`` becomes is returned."""
    products = [product(rms_norm(x, norm, eps), weight) for weight in weights]
    if mode == "swiglu":
        return torch.nn.functional.silu(products[0]) * products[1]
    y = torch.cat(products, dim=-1)
    return out + y if mode == "add" else y
