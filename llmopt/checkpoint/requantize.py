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

import torch

from llmopt.ops.int4_linear import layout
from llmopt.passes.quantize_gptq.linear import QuantEmbedding, QuantLinear

_BLOCK_WEIGHTS = 2**21


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
    scales, zeros = [], []
    for tiles in _tile_blocks(n, k):
        _, s, z = layout.unpack(
            module.packed[tiles].cpu(), out_features=_rows(tiles, n), in_features=k, group_size=group,
            bits=module.bits, asymmetric=asymmetric,
        )  # fmt: skip
        scales.append(s)
        zeros.append(z)
    perm = module.perm.cpu() if isinstance(module, QuantLinear) and module.perm is not None else None
    all_zeros = torch.cat([z for z in zeros if z is not None]) if asymmetric else None
    return Grid(torch.cat(scales), all_zeros, perm, n, k, module.bits, group)


def pack_rows(read_rows: Callable[[int, int], torch.Tensor], grid: Grid) -> Iterator[tuple[slice, torch.Tensor]]:
    """Quantize to the nearest codes, block by block.

    Args:
        read_rows: gives rows ``start:stop`` of the weight, ``[stop - start, K]`` of any float dtype.
        grid: scales and zeros.

    Yields:
        ``(tiles, packed[tiles])``.
    """
    for tiles in _tile_blocks(grid.out_features, grid.in_features):
        rows = slice(tiles.start * layout.TILE_ROWS, min(tiles.stop * layout.TILE_ROWS, grid.out_features))
        weight = read_rows(rows.start, rows.stop).cpu().float()
        if grid.perm is not None:
            weight = weight[:, grid.perm]
        scales = grid.scales[rows]
        zeros = None if grid.zeros is None else grid.zeros[rows]
        zero = 2.0 ** (grid.bits - 1) if zeros is None else _columns(zeros.float(), grid)
        q = (weight / _columns(scales.float(), grid)).add_(zero).round_().clamp_(0, 2**grid.bits - 1)
        yield tiles, layout.pack(q.to(torch.uint8), scales, zeros, group_size=grid.kernel_group, bits=grid.bits)


def reproduces(read_rows: Callable[[int, int], torch.Tensor], grid: Grid, packed: torch.Tensor) -> bool:
    """True when the packed bytes come back from these weights."""
    return all(torch.equal(block, packed[tiles].cpu()) for tiles, block in pack_rows(read_rows, grid))


def dequantized_rows(module: QuantLinear | QuantEmbedding, grid: Grid, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The weight the codes stand for, ``[rows, K]`` of ``dtype``, block by block, columns in their original order."""
    for tiles in _tile_blocks(grid.out_features, grid.in_features):
        weight = layout.dequantize(
            module.packed[tiles].cpu(), out_features=_rows(tiles, grid.out_features), in_features=grid.in_features,
            group_size=grid.kernel_group, bits=grid.bits, asymmetric=grid.zeros is not None,
        )  # fmt: skip
        if grid.perm is not None:
            weight = weight[:, torch.argsort(grid.perm)]
        yield weight.to(dtype)


def sha256(packed: torch.Tensor) -> str:
    """Hash of a packed buffer's bytes."""
    return hashlib.sha256(packed.detach().cpu().contiguous().numpy().data).hexdigest()


def _columns(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    return x.repeat_interleave(grid.kernel_group, -1)[:, : grid.in_features]


def _tile_blocks(out_features: int, in_features: int) -> Iterator[slice]:
    tiles = -(-out_features // layout.TILE_ROWS)
    step = max(1, _BLOCK_WEIGHTS // (in_features * layout.TILE_ROWS))
    for start in range(0, tiles, step):
        yield slice(start, min(start + step, tiles))


def _rows(tiles: slice, out_features: int) -> int:
    rows: int = min(tiles.stop * layout.TILE_ROWS, out_features) - tiles.start * layout.TILE_ROWS
    return rows
