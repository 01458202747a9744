"""int8_linear in plain torch: the int4 reference at 8 bits."""

from __future__ import annotations

import torch

from llmopt.ops.int4_linear import reference


def linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, *, out_features: int, group_size: int
) -> torch.Tensor:
    """``x [T, K] @ dequantize(packed) [N, K].T + bias``, activations quantized per token and group, fp32 inside."""
    return reference.linear(x, packed, bias, out_features=out_features, group_size=group_size, asymmetric=False, bits=8)
