"""The packed layout of quantized weights (int4 and int8), in plain torch: what the C++ kernels read.

Tiles of 16 output rows, each a block of bytes without a gap (kernels/cpu/quant_linear.h has the picture): uint8 zeros
``[num_groups, 16]`` padded to lines of 64 bytes when asymmetric, then group by group a line of 16 float16 scales and 16 int16
sums of the group's ``q - zero``, and vectors of 64 bytes: lane r (4 bytes) is row r, four consecutive k in the low nibbles
and the next four in the high ones.
int8 (stored plus 128) is two planes: tiles of the codes' high nibbles, which can be read alone, and behind the last of them
the vectors of the low nibbles (:func:`planes`). ``in_features`` is padded to whole groups with the zero point, rows to whole
tiles.

Letters: N out_features, K in_features, G groups, T tiles.
"""

from __future__ import annotations

from typing import Any

import torch

from llmopt.errors import InputError

TILE_ROWS = 16
LINE = 64  # bytes of a group's scales and sums
KERNEL_GROUPS = (32, 64, 128)


def _zeros_bytes(groups: int, *, asymmetric: bool) -> int:
    return -(-groups * TILE_ROWS // LINE) * LINE if asymmetric else 0


def tile_bytes(in_features: int, group_size: int, *, bits: int, asymmetric: bool) -> int:
    """Bytes of one tile of 16 rows."""
    groups = -(-in_features // group_size)
    lines = _zeros_bytes(groups, asymmetric=asymmetric) + groups * LINE
    return lines + plane_bytes(in_features, group_size) * (bits // 4)


def plane_bytes(in_features: int, group_size: int) -> int:
    """Bytes of one plane of nibbles of a tile."""
    return -(-in_features // group_size) * group_size * TILE_ROWS // 2


def planes(
    packed: torch.Tensor, *, in_features: int, group_size: int, bits: int, asymmetric: bool
) -> tuple[torch.Tensor, ...]:
    """Views of the parts of ``packed``, contiguous ``[..., T, tile_bytes]``, that have a row for every tile.

    Returns:
        zeros, scales, sums and codes ``[..., T, B]``; of int8 the codes' high nibbles, and the low nibbles ``[..., T, P]``.
    """
    if bits == 4:
        return (packed,)
    *lead, tiles, size = packed.shape
    first = size - plane_bytes(in_features, group_size)
    flat = packed.view(*lead, tiles * size)
    return (
        flat[..., : tiles * first].unflatten(-1, (tiles, first)),
        flat[..., tiles * first :].unflatten(-1, (tiles, size - first)),
    )


def group_parts(
    first: torch.Tensor, *, in_features: int, group_size: int, asymmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the groups of a first plane ``[..., T, B]`` (:func:`planes`).

    Returns:
        ``(lines [..., T, G, 64], vectors [..., T, G, group_size * 8])``: scales and sums, and codes.
    """
    groups = -(-in_features // group_size)
    each = first[..., _zeros_bytes(groups, asymmetric=asymmetric) :].unflatten(-1, (groups, -1))
    return each[..., :LINE], each[..., LINE:]


def take_tiles(
    packed: torch.Tensor, tiles: slice, *, in_features: int, group_size: int, bits: int, asymmetric: bool
) -> torch.Tensor:
    """Some tiles of a weight ``[T, tile_bytes]``, as a weight of their own; of int8 a copy."""
    parts = planes(packed, in_features=in_features, group_size=group_size, bits=bits, asymmetric=asymmetric)
    return _joined([part[tiles] for part in parts])


def put_tiles(
    packed: torch.Tensor, tiles: slice, values: torch.Tensor, *, in_features: int, group_size: int, bits: int,
    asymmetric: bool,
) -> None:  # fmt: skip
    """The inverse of :func:`take_tiles`: some tiles of ``packed`` become those of the weight ``values``."""
    size: dict[str, Any] = {
        "in_features": in_features,
        "group_size": group_size,
        "bits": bits,
        "asymmetric": asymmetric,
    }
    for into, part in zip(planes(packed, **size), planes(values, **size), strict=True):
        into[tiles] = part


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of :func:`planes`."""
    if len(parts) == 1:
        return parts[0].contiguous()
    tiles = parts[0].shape[-2]
    joined: torch.Tensor = torch.cat([part.flatten(-2) for part in parts], -1).unflatten(-1, (tiles, -1))
    return joined


def packed_shape(
    out_features: int, in_features: int, group_size: int, *, bits: int, asymmetric: bool
) -> tuple[int, int]:
    """Shape of the uint8 tensor that holds a weight ``[out_features, in_features]``."""
    tiles = -(-out_features // TILE_ROWS)
    return tiles, tile_bytes(in_features, group_size, bits=bits, asymmetric=asymmetric)


def check_indices(name: str, index: torch.Tensor) -> None:
    """Raises InputError for anything but integers: a float index would be cut off without a word."""
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise InputError.argument(name, expected="an integer dtype", got=index.dtype)


def pack(
    q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, group_size: int, bits: int
) -> torch.Tensor:
    """Packs integer weights for the kernels.

    Args:
        q: ``[..., N, K]`` uint8, values 0..15 (int4) or 0..255 (int8, zero at 128).
        scales: ``[..., N, G]``, taken to float16.
        zeros: ``[..., N, G]`` uint8, or None when symmetric (8, or 128 for int8).
        group_size: 32, 64 or 128; the last group may be short.
        bits: 4 or 8.

    Returns:
        ``[..., T, tile_bytes]`` uint8.

    Raises:
        InputError: a shape, dtype or the group size does not fit, a code has more than ``bits`` bits, or a scale is
            not finite in float16.
    """
    if group_size not in KERNEL_GROUPS:
        raise InputError.argument("group_size", expected="32, 64 or 128", got=group_size)
    _check_codes(q, bits)
    *lead, n, k = q.shape
    groups = -(-k // group_size)
    if tuple(scales.shape) != (*lead, n, groups):
        raise InputError.argument("scales", expected=f"shape {(*lead, n, groups)}", got=tuple(scales.shape))
    scales = scales.to(torch.float16)
    if not torch.isfinite(scales).all():
        raise InputError("scales: expected finite float16 values, got NaN, Inf or more than 65504")
    pad_n, pad_k = -n % TILE_ROWS, groups * group_size - k
    zero_point = 8 if bits == 4 else 128
    if zeros is None:
        q = torch.nn.functional.pad(q, (0, pad_k, 0, pad_n), value=zero_point)
    else:
        if zeros.shape != scales.shape:
            raise InputError.argument("zeros", expected=f"shape {tuple(scales.shape)}", got=tuple(zeros.shape))
        last = zeros[..., -1:].expand(*lead, n, pad_k) if pad_k else q[..., :0]
        q = torch.nn.functional.pad(torch.cat([q, last.to(torch.uint8)], -1), (0, 0, 0, pad_n))
    tiles = (n + pad_n) // TILE_ROWS
    lines = torch.cat([_by_tile(x, pad_n) for x in (scales, _sums(q[..., :n, :], zeros, groups, zero_point))], -1)
    first, *rest = _vectors(q, tiles, bits)
    parts = [torch.cat([lines, first.unflatten(-1, (groups, group_size * 8))], -1).flatten(-2)]
    if zeros is not None:
        points = _by_tile(zeros.to(torch.uint8), pad_n).flatten(-2)
        missing = _zeros_bytes(groups, asymmetric=True) - points.shape[-1]
        parts.insert(0, torch.nn.functional.pad(points, (0, missing)))
    return _joined([torch.cat(parts, -1), *rest])


def _check_codes(q: torch.Tensor, bits: int) -> None:
    if bits not in (4, 8):
        raise InputError.argument("bits", expected="4 or 8", got=bits)
    if q.dtype != torch.uint8 or q.dim() < 2:
        raise InputError.argument("q", expected="uint8 of shape [..., N, K]", got=(q.dtype, tuple(q.shape)))
    # a fifth bit would land in the neighbour's nibble
    if bits == 4 and q.numel() and int(q.max()) > 15:
        raise InputError.argument("q", expected="codes in [0, 15]", got=int(q.max()))


def _sums(q: torch.Tensor, zeros: torch.Tensor | None, groups: int, zero_point: int) -> torch.Tensor:
    """``[..., N, G]`` int16: sums of a group's ``q - zero``; q is whole groups."""
    group_size = q.shape[-1] // groups
    codes = q.unflatten(-1, (groups, group_size)).sum(-1, dtype=torch.int32)
    sums: torch.Tensor = codes - group_size * (zero_point if zeros is None else zeros.int())
    return sums.to(torch.int16)


def _by_tile(x: torch.Tensor, pad_n: int) -> torch.Tensor:
    """Values of every row and group ``[..., N, G]`` as bytes ``[..., T, G, B]``, those of a tile's rows side by side."""
    *lead, _, groups = x.shape
    rows = torch.nn.functional.pad(x, (0, 0, 0, pad_n)).reshape(*lead, -1, TILE_ROWS, groups)
    return rows.transpose(-1, -2).contiguous().view(torch.uint8)


def _vectors(q: torch.Tensor, tiles: int, bits: int) -> list[torch.Tensor]:
    """``[..., T, K * 8]`` a plane."""
    *lead, _, k = q.shape
    # [..., T, row, k/4, 4] -> [..., T, k/4, row, 4]
    quads = q.reshape(*lead, tiles, TILE_ROWS, k // 4, 4).transpose(-2, -3)
    low, high = quads.reshape(*lead, tiles, k // 8, 2, TILE_ROWS, 4).unbind(-3)
    nibbles = [low | (high << 4)] if bits == 4 else [(low >> 4) | (high & 240), (low & 15) | (high << 4)]
    return [plane.reshape(*lead, tiles, k * 8) for plane in nibbles]


def unpack(
    packed: torch.Tensor, *, out_features: int, in_features: int, group_size: int, bits: int, asymmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inverse of :func:`pack`: ``(q [..., N, K] uint8, scales [..., N, G] float16, zeros [..., N, G] uint8 or None)``."""
    *lead, tiles, _ = packed.shape
    groups = -(-in_features // group_size)
    k = groups * group_size
    parts = planes(
        packed.contiguous(), in_features=in_features, group_size=group_size, bits=bits, asymmetric=asymmetric
    )
    lines, high = group_parts(parts[0], in_features=in_features, group_size=group_size, asymmetric=asymmetric)

    def rows(x: torch.Tensor) -> torch.Tensor:  # [..., T, G, 16] -> [..., N, G]
        return x.transpose(-1, -2).reshape(*lead, tiles * TILE_ROWS, groups)[..., :out_features, :].contiguous()

    scales = lines[..., : TILE_ROWS * 2].contiguous().view(torch.float16)
    zeros = None
    if asymmetric:
        zeros = rows(parts[0][..., : groups * TILE_ROWS].unflatten(-1, (groups, TILE_ROWS)))
    vectors = [part.reshape(*lead, tiles, k // 8, TILE_ROWS, 4) for part in (high, *parts[1:])]
    nibbles = [torch.stack([plane & 15, plane >> 4], -3) for plane in vectors]
    codes = nibbles[0] if bits == 4 else (nibbles[0] << 4) | nibbles[1]
    quads = codes.reshape(*lead, tiles, k // 4, TILE_ROWS, 4).transpose(-2, -3)
    q = quads.reshape(*lead, tiles * TILE_ROWS, k)[..., :out_features, :in_features].contiguous()
    return q, rows(scales), zeros


def dequantize(
    packed: torch.Tensor, *, out_features: int, in_features: int, group_size: int, bits: int, asymmetric: bool
) -> torch.Tensor:
    """The weight the kernels stand for: ``[..., N, K]`` float32, ``scale * (q - zero)``."""
    q, scales, zeros = unpack(
        packed, out_features=out_features, in_features=in_features, group_size=group_size, bits=bits,
        asymmetric=asymmetric,
    )  # fmt: skip
    zero = zeros.float() if zeros is not None else torch.full_like(scales, 8.0 if bits == 4 else 128.0).float()

    def columns(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(group_size, -1)[..., :in_features]

    return (q.float() - columns(zero)) * columns(scales.float())
