"""latent_output: what attention gave in latent space, expanded to each head's values (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered
from llmopt.ops.latent_cache.weights import group_for

__all__ = ["latent_output"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define("latent_output(Tensor latent, Tensor w_uv, int v_dim) -> Tensor")


def latent_output(latent: torch.Tensor, w_uv: torch.Tensor, *, v_dim: int) -> torch.Tensor:
    """``out[t, h * V : (h + 1) * V] = latent[t, h] @ w_uv[h].T``: the value half of kv_b_proj, head by head.

    With 8-bit weights the latents are taken to int8 per token, head and group. Nothing is copied: the tensors may belong to a
    program that is being recorded.

    Args:
        latent: ``[T, H, R]`` float32, bfloat16 or float16, contiguous, from :func:`llmopt.ops.latent_attention`.
        w_uv: ``[H, V, R]`` of a float dtype or 8 bits packed, from :func:`llmopt.ops.latent_cache.absorbed_weights`.
        v_dim: V.

    Returns:
        ``[T, H * V]`` float32.

    Raises:
        InputError: shapes, dtypes or strides do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if torch.compiler.is_compiling():
        out: torch.Tensor = torch.ops.llmopt.latent_output(latent, w_uv, v_dim)
        return out
    return implementation("latent_output", _cpu, latent)(latent, w_uv, v_dim)


def _cpu(latent: torch.Tensor, w_uv: torch.Tensor, v_dim: int) -> torch.Tensor:
    if latent.dim() != 3 or v_dim < 1:
        got = f"{list(latent.shape)} and {v_dim}"
        raise InputError(f"latent_output: expected latent [T, H, R] and a v_dim of 1 or more, got {got}")
    out = torch.empty(latent.shape[0], latent.shape[1] * v_dim)
    try:
        native.library().latent_output(latent, w_uv, group_for(latent.shape[2]), out)
    except ValueError as error:
        raise InputError(f"latent_output: {error}") from None
    return out


def _fake(latent: torch.Tensor, w_uv: torch.Tensor, v_dim: int) -> torch.Tensor:
    torch._check(w_uv.shape[0] == latent.shape[1], lambda: f"w_uv: expected {latent.shape[1]} heads")
    return latent.new_empty(latent.shape[0], latent.shape[1] * v_dim, dtype=torch.float32)


_LIBRARY.impl("latent_output", _cpu, "CPU")
_LIBRARY.impl("latent_output", registered("latent_output"), "CUDA")
torch.library.register_fake("llmopt::latent_output", _fake, lib=_LIBRARY)
