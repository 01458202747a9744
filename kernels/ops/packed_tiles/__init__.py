"""packed_tiles: weights of a checkpoint into the tiles that the kernels read, in place and on all threads.

Used while loading, on the CPU. Without the compiled kernels the reference runs: same bytes, many times slower.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.int4_linear import layout
from llmopt.ops.packed_tiles import reference

__all__ = ["packed_nearest", "packed_sums", "packed_words"]

_NO_ZEROS = torch.empty(0, dtype=torch.uint8)


def packed_words(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, out: torch.Tensor, *, in_features: int,
    group_size: int, bits: int,
) -> None:  # fmt: skip
    """Codes from the words of a GPTQ file.

    Args:
        words: ``[ceil(K * bits / 32), N]`` int32: consecutive columns of a row, the first in the lowest bits. Rows may
            be any slice of a larger tensor's columns.
        scales: ``[N, G]`` float16, finite.
        zeros: ``[N, G]`` uint8, or None when symmetric.
        out: ``[T, tile_bytes]`` uint8, written (:func:`llmopt.ops.int4_linear.layout.packed_shape`).
        in_features: K.
        group_size: 32, 64 or 128; the last group may be short.
        bits: 4 or 8.

    Raises:
        InputError: a shape, dtype or size does not fit.
    """
    if not native.available():
        out.copy_(
            reference.packed_words(words, scales, zeros, in_features=in_features, group_size=group_size, bits=bits)
        )
        return
    none = _NO_ZEROS if zeros is None else zeros
    try:
        native.library().packed_words(words, in_features, scales, none, group_size, bits, out)
    except ValueError as error:
        raise InputError(f"packed_words: {error}") from None


def packed_nearest(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, out: torch.Tensor, *, group_size: int,
    bits: int, first_tile: int = 0,
) -> None:  # fmt: skip
    """The nearest code of each weight: ``round(w / scale + zero)``, ties to even, within the range of the bits.

    Args:
        weight: ``[N, K]`` float32, bfloat16 or float16, finite; rows may have gaps between them.
        scales: ``[N, G]`` float16, finite and not 0.
        zeros: ``[N, G]`` uint8, or None when symmetric.
        out: ``[T, tile_bytes]`` uint8, contiguous: the whole packed weight, of which these rows' tiles are written.
        group_size: 32, 64 or 128; the last group may be short.
        bits: 4 or 8.
        first_tile: the tile of ``out`` that ``weight`` begins with; N fills whole tiles, or reaches the last.

    Raises:
        InputError: a shape, dtype or size does not fit, or a weight is NaN or Inf.
    """
    if not native.available():
        if not bool(torch.isfinite(weight).all()):
            raise InputError("packed_nearest: weight: expected finite values, got NaN or Inf")
        packed = reference.packed_nearest(weight, scales, zeros, group_size=group_size, bits=bits)
        behind = out.shape[0] - first_tile - packed.shape[0]
        if first_tile < 0 or behind < 0 or (behind > 0 and weight.shape[0] % layout.TILE_ROWS):
            place = f"{weight.shape[0]} rows from tile {first_tile} on do not fit in {out.shape[0]} tiles"
            raise InputError(f"packed_nearest: first_tile: {place}")
        layout.put_tiles(
            out, slice(first_tile, first_tile + packed.shape[0]), packed, in_features=weight.shape[1],
            group_size=group_size, bits=bits, asymmetric=zeros is not None,
        )  # fmt: skip
        return
    if weight.dtype == torch.float16:
        weight = weight.float()
    none = _NO_ZEROS if zeros is None else zeros
    try:
        native.library().packed_nearest(weight, scales, none, group_size, bits, out, first_tile)
    except ValueError as error:
        raise InputError(f"packed_nearest: {error}") from None


def packed_sums(tiles: torch.Tensor, *, in_features: int, group_size: int, bits: int) -> None:
    """Writes the sums of symmetric tiles that have everything else.

    Args:
        tiles: ``[T, tile_bytes]`` uint8, contiguous, changed in place; of 8 bits all tiles of one weight, since their low
            nibbles lie behind them.
        in_features: K.
        group_size: 32, 64 or 128.
        bits: 4 or 8.

    Raises:
        InputError: a shape, dtype or size does not fit.
    """
    if not native.available():
        tiles.copy_(reference.packed_sums(tiles, in_features=in_features, group_size=group_size, bits=bits))
        return
    try:
        native.library().packed_sums(tiles, in_features, group_size, bits)
    except ValueError as error:
        raise InputError(f"packed_sums: {error}") from None
