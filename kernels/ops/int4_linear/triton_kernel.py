"""int4_linear on NVIDIA GPUs, by the kernels of :mod:`llmopt.ops.fused_linear.triton_kernel`: 16-bit activations (W4A16)."""

from __future__ import annotations

import torch

from llmopt.ops.fused_linear.triton_kernel import STORE
from llmopt.ops.fused_linear.triton_kernel import run as fused_linear


def run(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, group_size: int,
    asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of the torch op."""
    return linear(x, packed, bias, out_features, group_size, asymmetric, 4)


def linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, rows: int, group_size: int, asymmetric: bool,
    bits: int,
) -> torch.Tensor:  # fmt: skip
    """One linear, of tokens of any shape, in their dtype."""
    tokens = x.reshape(-1, x.shape[-1])
    out = torch.empty(tokens.shape[0], rows, device=x.device)
    biases = None if bias is None else [bias.float()]
    fused_linear(
        tokens if tokens.stride(1) == 1 else tokens.contiguous(), None, 0.0, [packed], [rows], [bits], [int(asymmetric)],
        group_size, biases, STORE, out,
    )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], rows)
