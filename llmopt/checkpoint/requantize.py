"""Head and embedding: quantized at run time, unquantized in the standard files, and quantized again on load.

Their scales lie in ``llmopt.scales``. With given scales the code of each weight is the nearest one, so the packed bytes
come out the same from the original weights, and also from dequantized ones in bfloat16: that rounds to 8 significant
bits, which moves a code of at most 128 by at most a quarter. Rows are worked on in blocks, since these are the largest
tensors of a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.ops.int4_linear import layout
from llmopt.ops.packed_tiles import packed_nearest
from llmopt.packed import QuantEmbedding, QuantLinear

_BLOCK_WEIGHTS = 2**21
ReadRows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Grid:
    """Everything but the codes of a packed weight ``[N, K]``.

    ``scales [N, G]`` float16, ``zeros [N, G]`` uint8 or None, ``perm [K]`` int64 or None (as :class:`QuantLinear`'s).
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    out_features: int
    in_features: int
    bits: int
    kernel_group: int


def grid_of(module: QuantLinear | QuantEmbedding) -> Grid:
    """Scales and zeros of a packed module, its codes left out."""
    if isinstance(module, QuantEmbedding):
        n, k, group, asymmetric = module.num_embeddings, module.embedding_dim, module.group_size, False
    else:
        n, k, group, asymmetric = module.out_features, module.in_features, module.kernel_group, module.asymmetric
    size: dict[str, Any] = {"in_features": k, "group_size": group, "bits": module.bits, "asymmetric": asymmetric}
    scales, zeros = [], []
    for tiles in _tile_blocks(n, k):
        _, s, z = layout.unpack(
            layout.take_tiles(module.packed, tiles, **size).cpu(), out_features=_rows(tiles, n), **size
        )
        scales.append(s)
        zeros.append(z)
    perm = module.perm.cpu() if isinstance(module, QuantLinear) and module.perm is not None else None
    all_zeros = torch.cat([z for z in zeros if z is not None]) if asymmetric else None
    return Grid(torch.cat(scales), all_zeros, perm, n, k, module.bits, group)


def _size(grid: Grid) -> dict[str, Any]:
    """What the functions of layout want to know of a weight."""
    return {"in_features": grid.in_features, "group_size": grid.kernel_group, "bits": grid.bits,
            "asymmetric": grid.zeros is not None}  # fmt: skip


def packed_shape(grid: Grid) -> tuple[int, int]:
    """Of the packed weight."""
    return layout.packed_shape(
        grid.out_features, grid.in_features, grid.kernel_group, bits=grid.bits, asymmetric=grid.zeros is not None
    )


def pack_rows(read_rows: ReadRows, grid: Grid, out: torch.Tensor) -> None:
    """Quantize to the nearest codes, block by block.

    Args:
        read_rows: gives rows ``start:stop`` of the weight, ``[stop - start, K]`` of any float dtype.
        grid: scales and zeros.
        out: written.

    Raises:
        InputError: a weight is NaN or Inf.
    """
    for tiles in _tile_blocks(grid.out_features, grid.in_features):
        _pack_block(read_rows, grid, tiles, out, tiles.start)


def reproduces(read_rows: ReadRows, grid: Grid, packed: torch.Tensor) -> bool:
    """True when the packed bytes come back from these weights."""
    for tiles in _tile_blocks(grid.out_features, grid.in_features):
        expected = layout.take_tiles(packed, tiles, **_size(grid)).cpu()
        block = torch.empty_like(expected)
        _pack_block(read_rows, grid, tiles, block, 0)
        if not torch.equal(block, expected):
            return False
    return True


def _pack_block(read_rows: ReadRows, grid: Grid, tiles: slice, out: torch.Tensor, first_tile: int) -> None:
    rows = slice(tiles.start * layout.TILE_ROWS, min(tiles.stop * layout.TILE_ROWS, grid.out_features))
    weight = read_rows(rows.start, rows.stop).cpu()
    if grid.perm is not None:
        weight = weight[:, grid.perm]
    zeros = None if grid.zeros is None else grid.zeros[rows]
    packed_nearest(
        weight, grid.scales[rows], zeros, out, group_size=grid.kernel_group, bits=grid.bits, first_tile=first_tile
    )


def dequantized_rows(module: QuantLinear | QuantEmbedding, grid: Grid, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The weight the codes stand for, ``[rows, K]`` of ``dtype``, block by block, columns in their original order."""
    for tiles in _tile_blocks(grid.out_features, grid.in_features):
        weight = layout.dequantize(
            layout.take_tiles(module.packed, tiles, **_size(grid)).cpu(), out_features=_rows(tiles, grid.out_features),
            **_size(grid),
        )  # fmt: skip
        if grid.perm is not None:
            weight = weight[:, torch.argsort(grid.perm)]
        yield weight.to(dtype)


def sha256(packed: torch.Tensor) -> str:
    """Hash of a packed buffer's bytes."""
    return hashlib.sha256(packed.detach().cpu().contiguous().numpy().data).hexdigest()


def _tile_blocks(out_features: int, in_features: int) -> Iterator[slice]:
    tiles = -(-out_features // layout.TILE_ROWS)
    step = max(1, _BLOCK_WEIGHTS // (in_features * layout.TILE_ROWS))
    for start in range(0, tiles, step):
        yield slice(start, min(start + step, tiles))


def _rows(tiles: slice, out_features: int) -> int:
    rows: int = min(tiles.stop * layout.TILE_ROWS, out_features) - tiles.start * layout.TILE_ROWS
    return rows
