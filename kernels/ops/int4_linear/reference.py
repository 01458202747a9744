"""int4_linear in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmopt.ops.int4_linear import layout

STEPS = 253.0  # of a group's range: kSteps in kernels/cpu/quant_linear_kernel.h

_sixteen_bits = False


@contextmanager
def sixteen_bit_tokens() -> Iterator[None]:
    """Within it tokens are not quantized, as on a GPU."""
    global _sixteen_bits
    before, _sixteen_bits = _sixteen_bits, True
    try:
        yield
    finally:
        _sixteen_bits = before


def quantize_tokens(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[T, K]`` as the kernels see it: int8, one scale and one zero point per token and group; dequantized, float32."""
    tokens, k = x.shape
    if _sixteen_bits:
        return x.float()
    groups = -(-k // group_size)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group_size - k)).reshape(tokens, groups, group_size)
    # as the kernels do it, down to the rounding, so that the codes agree: one division, one product a value
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    steps = high.double() - low.double()
    zero = steps < 1e-35
    inverse = torch.where(zero, 0.0, STEPS / steps).float()
    scale = torch.where(zero, 0.0, steps / STEPS).float()
    zero_point = -127.0 - (low * inverse).round()
    q = (padded * inverse).round() + zero_point
    scale = torch.where(padded.isfinite().all(-1, keepdim=True), scale, torch.nan)
    return ((q - zero_point) * scale).reshape(tokens, groups * group_size)[:, :k]


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
