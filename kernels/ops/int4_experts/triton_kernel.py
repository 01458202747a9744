"""int4_experts on NVIDIA GPUs: the experts of :mod:`llmopt.ops.moe.triton_kernel` under a router of the caller's."""

from __future__ import annotations

import torch

from llmopt.ops.moe.triton_kernel import experts


def run(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    intermediate: int, group_size: int, down_group_size: int, asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of the torch op."""
    out = torch.zeros(x.shape, device=x.device)
    if index.numel():
        sizes = [intermediate, group_size, down_group_size, 4, int(asymmetric)]
        x = x if x.stride(-1) == 1 else x.contiguous()
        experts(x, None, 0.0, index.int().contiguous(), weights.float().contiguous(), gate_up, down, sizes, out)
    return out.to(x.dtype)
