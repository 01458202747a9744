"""latent_output on NVIDIA GPUs: a batched product over the heads, by cuBLAS."""

from __future__ import annotations

import torch

from llmopt.errors import InputError
from llmopt.ops.latent_cache.triton_kernel import heads_linear


def run(latent: torch.Tensor, w_uv: torch.Tensor, v_dim: int) -> torch.Tensor:
    """Arguments and result as of the torch op."""
    if latent.dim() != 3 or w_uv.shape[0] != latent.shape[1] or v_dim < 1:
        raise InputError.argument("latent_output: latent", expected=f"[T, {w_uv.shape[0]}, R]", got=tuple(latent.shape))
    return heads_linear(latent, w_uv, v_dim).flatten(1)
