"""latent_output in plain torch."""

from __future__ import annotations

import torch

from llmopt.ops.latent_cache.reference import heads_linear


def latent_output(latent: torch.Tensor, w_uv: torch.Tensor, *, v_dim: int) -> torch.Tensor:
    """Arguments and result as of :func:`llmopt.ops.latent_output.latent_output`."""
    return heads_linear(latent.float(), w_uv, v_dim).flatten(1)
