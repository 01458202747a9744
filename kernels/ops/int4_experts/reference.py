"""int4_experts in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch

from llmopt.ops.int4_linear import reference


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    intermediate: int,
    group_size: int,
    down_group_size: int,
    asymmetric: bool,
) -> torch.Tensor:
    """Loop over tokens and choices; activations quantized before each product, everything else fp32."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for t in range(x.shape[0]):
        for j in range(index.shape[1]):
            e = int(index[t, j])
            both = reference.linear(
                x[t : t + 1].float(), gate_up[e], None, out_features=2 * intermediate, group_size=group_size,
                asymmetric=asymmetric,
            )  # fmt: skip
            act = torch.nn.functional.silu(both[:, :intermediate]) * both[:, intermediate:]
            y = reference.linear(
                act, down[e], None, out_features=x.shape[1], group_size=down_group_size, asymmetric=asymmetric
            )
            out[t] += weights[t, j].float() * y[0]
    return out.to(x.dtype)
