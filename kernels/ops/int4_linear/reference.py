"""int4_linear in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch

from llmopt.ops.int4_linear import layout


def quantize_tokens(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[T, K]`` as the kernels see it: int8, symmetric, one scale per token and group; returned dequantized, float32."""
    tokens, k = x.shape
    groups = -(-k // group_size)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group_size - k)).reshape(tokens, groups, group_size)
    # as the kernels do it, down to the rounding, so that the codes agree: one division, one product a value
    # (`127.0 / amax` would be a reciprocal and a product)
    amax = padded.abs().amax(-1, keepdim=True)
    q = torch.where(amax > 1e-36, padded * torch.full_like(amax, 127.0).div(amax), torch.zeros_like(padded)).round()
    scale = amax / 127.0
    return (q * scale).reshape(tokens, groups * group_size)[:, :k]


def linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, *, out_features: int, group_size: int,
    asymmetric: bool, bits: int = 4,
) -> torch.Tensor:  # fmt: skip
    """``x [T, K] @ dequantize(packed) [N, K].T + bias``, activations quantized per token and group, fp32 inside."""
    weight = layout.dequantize(
        packed, out_features=out_features, in_features=x.shape[1], group_size=group_size, bits=bits,
        asymmetric=asymmetric,
    )  # fmt: skip
    y = quantize_tokens(x, group_size) @ weight.T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
