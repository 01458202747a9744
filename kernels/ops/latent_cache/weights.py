"""W_UK and W_UV of multi-head latent attention: the two halves of kv_b_proj, one small weight a head."""

from __future__ import annotations

import torch

from llmopt.errors import InputError
from llmopt.ops.int4_linear import layout
from llmopt.ops.packed_tiles import packed_nearest

__all__ = ["absorbed_weights", "dense_weight", "group_for"]


def group_for(in_features: int) -> int:
    """The largest group size of the kernels that a weight of so many columns fills."""
    return next((g for g in (128, 64) if in_features >= g), 32)


def absorbed_weights(
    kv_b: torch.Tensor, *, heads: int, nope: int, dtype: torch.dtype = torch.uint8
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(w_uk, w_uv)`` for :func:`latent_cache` and :func:`latent_output` from kv_b_proj.weight.

    Args:
        kv_b: ``[heads * (nope + V), R]`` of a float dtype; a quantized one dequantized.
        heads: query heads.
        nope: qk_nope_head_dim.
        dtype: uint8 for 8 bits (symmetric, one scale per ``group_for`` columns), or float32, bfloat16 or float16.

    Returns:
        ``w_uk`` and ``w_uv``: ``[heads, R, nope]`` and ``[heads, V, R]`` of dtype, or ``[heads, tiles, tile_bytes]``.

    Raises:
        InputError: the shape does not fit, or the dtype is another one.
    """
    if kv_b.dim() != 2 or heads < 1 or kv_b.shape[0] % heads or kv_b.shape[0] // heads <= nope or nope < 1:
        expected = f"[{heads} * (more than {nope}), R]"
        raise InputError.argument("kv_b", expected=expected, got=list(kv_b.shape))
    uk, uv = kv_b.view(heads, -1, kv_b.shape[1]).tensor_split([nope], dim=1)
    if dtype == torch.uint8:
        return _packed(uk.transpose(1, 2)), _packed(uv)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError.argument("dtype", expected="uint8 or a float dtype of 16 or 32 bits", got=dtype)
    return uk.transpose(1, 2).to(dtype).contiguous(), uv.to(dtype).contiguous()


def _packed(weight: torch.Tensor) -> torch.Tensor:
    heads, rows, cols = weight.shape
    group = group_for(cols)
    weight = weight.float().contiguous()
    padded = torch.nn.functional.pad(weight, (0, -cols % group)).unflatten(-1, (-1, group))
    scales = (padded.abs().amax(-1) / 127).clamp(min=1e-7).half()
    out = torch.empty(heads, *layout.packed_shape(rows, cols, group, bits=8, asymmetric=False), dtype=torch.uint8)
    for head in range(heads):
        packed_nearest(weight[head], scales[head], None, out[head], group_size=group, bits=8)
    return out


def dense_weight(weight: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """``[heads, out_features, in_features]`` float32: the numbers that w_uk or w_uv stands for."""
    if weight.dtype != torch.uint8:
        return weight.float()
    return layout.dequantize(
        weight, out_features=out_features, in_features=in_features, group_size=group_for(in_features), bits=8,
        asymmetric=False,
    )  # fmt: skip
