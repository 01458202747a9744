"""packed_tiles in plain torch."""

from __future__ import annotations

import torch

from llmopt.ops.int4_linear import layout


def packed_words(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, in_features: int, group_size: int,
    bits: int,
) -> torch.Tensor:  # fmt: skip
    """See the op; returns the tiles."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[:, None]
    q = (words[:, None] >> shifts) & (2**bits - 1)  # [W, codes a word, N]
    codes = q.flatten(0, 1)[:in_features].t().to(torch.uint8)
    return layout.pack(codes, scales, zeros, group_size=group_size, bits=bits)


def packed_nearest(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, group_size: int, bits: int
) -> torch.Tensor:
    """See the op; returns the tiles."""

    def columns(x: torch.Tensor) -> torch.Tensor:
        return x.float().repeat_interleave(group_size, -1)[:, : weight.shape[1]]

    zero = 2.0 ** (bits - 1) if zeros is None else columns(zeros)
    q = (weight.float() / columns(scales)).add_(zero).round_().clamp_(0, 2**bits - 1)
    return layout.pack(q.to(torch.uint8), scales, zeros, group_size=group_size, bits=bits)


def packed_sums(tiles: torch.Tensor, *, in_features: int, group_size: int, bits: int) -> torch.Tensor:
    """See the op; returns the tiles."""
    size = {"out_features": tiles.shape[0] * layout.TILE_ROWS, "in_features": in_features, "group_size": group_size}
    q, scales, _ = layout.unpack(tiles, **size, bits=bits, asymmetric=False)
    return layout.pack(q, scales, None, group_size=group_size, bits=bits)
