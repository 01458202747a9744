"""screened_head in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch

from llmopt.ops.fused_linear import Weight
from llmopt.ops.fused_linear.reference import product, rms_norm
from llmopt.ops.int4_linear import layout
from llmopt.ops.int4_linear.reference import quantize_tokens


def screened_head(
    x: torch.Tensor, weight: Weight, *, norm: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """``[T]`` int64: argmax of all 8-bit logits, none left out."""
    return product(rms_norm(x, norm, eps), weight).argmax(-1)


def screen(x: torch.Tensor, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """What the screen sees: logits from the high nibbles, and the margin's unit.

    Args:
        x: ``[T, K]``, normalized.
        weight: 8 bits.

    Returns:
        ``(logits [T, N], unit [T, N])``, float32: a row's exact logit is ``logits`` plus or minus about 4.6 ``unit``.
    """
    size = {"out_features": weight.rows, "in_features": weight.cols, "group_size": weight.group_size}
    q, scales, _ = layout.unpack(weight.data, **size, bits=8, asymmetric=False)
    tokens = quantize_tokens(x, weight.group_size)
    wide = scales.float().repeat_interleave(weight.group_size, -1)[:, : weight.cols]
    coarse = ((q & 240).float() + 7.5 - 128) * wide
    return tokens @ coarse.T, (tokens.square() @ wide.square().T).sqrt()
