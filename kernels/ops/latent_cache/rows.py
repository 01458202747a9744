"""The rows of a latent cache: a token's latent of R values, and its rotary key of P values behind it.

In int8 a row is R codes, and behind them the rotary key in bfloat16, R + 2 P bytes in all; the codes have one float32 scale a
token, their largest magnitude / 127. FlashMLA's FP8 cache keeps the rotary key in bfloat16 likewise: it carries positions, and
is not normalized as the latent is.
"""

from __future__ import annotations

import torch

from llmopt.ops.rope_cache.reference import quantize

__all__ = ["latent_codes", "latent_parts"]


def latent_codes(latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[..., R + 2 P]`` int8 and scales ``[...]`` float32 of latents ``[..., R]`` and rotary keys ``[..., P]``."""
    codes, scale = quantize(latent)
    return torch.cat([codes, rope.to(torch.bfloat16).contiguous().view(torch.int8)], -1), scale


def latent_parts(rows: torch.Tensor, scale: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., R]`` and ``[..., P]``: of an int8 cache in bfloat16, latents dequantized; of any other, views."""
    latent, rope = rows.tensor_split([rank], dim=-1)
    if scale is None:
        return latent, rope
    return (latent * scale[..., None]).to(torch.bfloat16), rope.view(torch.bfloat16)
