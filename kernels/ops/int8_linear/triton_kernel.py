"""int8_linear and quant_rows on NVIDIA GPUs, by the kernels of fused_linear and embed: activations keep 16 bits (W8A16)."""

from __future__ import annotations

import torch

from llmopt.ops.embed.triton_kernel import lookup
from llmopt.ops.int4_linear.triton_kernel import linear


def run(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, group_size: int
) -> torch.Tensor:
    """Arguments and result as of the torch op int8_linear."""
    return linear(x, packed, bias, out_features, group_size, False, 8)


def rows(
    ids: torch.Tensor, packed: torch.Tensor, out_features: int, in_features: int, group_size: int, bits: int,
    asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of the torch op quant_rows."""
    out = torch.empty(ids.numel(), in_features, device=packed.device)
    lookup("packed", ids.reshape(-1).contiguous(), packed, out_features, bits, group_size, asymmetric, out)
    return out.view(*ids.shape, in_features)
