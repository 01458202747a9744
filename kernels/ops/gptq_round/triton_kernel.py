"""gptq_round on NVIDIA GPUs: a program takes some rows of one weight; a span's columns stay in its registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError
from llmopt.ops.gptq_round.reference import SHRINKS

_MOST_COLUMNS = 128
_ROWS = 16


@triton.jit
def _codes(w, scale, zero, TOP: tl.constexpr):
    """Nearest code of each weight."""
    x = tl.minimum(tl.maximum(w * (1.0 / scale) + zero, -1.0), TOP + 1.0)
    # adding this rounds to the nearest whole number, halves to even ones
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, 0.0), TOP * 1.0)


@triton.jit
def _stored(scale):
    """What float16 holds of a scale, never 0."""
    half = scale.to(tl.float16).to(tl.float32)
    return tl.where(half == 0.0, 5.960464477539063e-08, half)


@triton.jit
def _search(
    w, importance, shares, scales, zeros, rows, columns, tried, SYMMETRIC: tl.constexpr, TOP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    n, j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    inside = n < rows
    at_row = w + (batch * rows + n) * columns
    # reduced after the loops: Triton 3.6 fails on a reduction in a loop whose result has two uses
    lows, highs = tl.zeros((BLOCK_N, BLOCK_S), tl.float32), tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for at in range(0, columns, BLOCK_S):
        x = tl.load(at_row[:, None] + at + j[None, :], mask=inside[:, None] & (at + j < columns)[None, :], other=0.0)
        lows, highs = tl.minimum(lows, x), tl.maximum(highs, x)
    low, high = tl.min(lows, 1), tl.max(highs, 1)
    if SYMMETRIC:
        cover = 2.0 * tl.maximum(-low, high) / TOP
        zero = tl.full((BLOCK_N,), (TOP + 1) / 2, tl.float32)
    else:
        cover = (high - low) / TOP
        zero = _codes(-low, tl.maximum(cover, 1e-30), 0.0, TOP)
    best, least = tl.full((BLOCK_N,), 1.0, tl.float32), tl.full((BLOCK_N,), float("inf"), tl.float32)
    for i in range(tried):
        scale = _stored(cover * tl.load(shares + i))
        squares = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
        for at in range(0, columns, BLOCK_S):
            here = at + j < columns
            x = tl.load(at_row[:, None] + at + j[None, :], mask=inside[:, None] & here[None, :], other=0.0)
            counts = tl.load(importance + batch * columns + at + j, mask=here, other=0.0)
            difference = (_codes(x, scale[:, None], zero[:, None], TOP) - zero[:, None]) * scale[:, None] - x
            squares += difference * difference * counts[None, :]
        error = tl.sum(squares, 1)
        better = error < least
        best, least = tl.where(better, scale, best), tl.where(better, error, least)
    tl.store(scales + batch * rows + n, best, mask=inside)
    tl.store(zeros + batch * rows + n, zero, mask=inside)


@triton.jit
def _span(
    w, u, scales, zeros, codes, errors, rows, columns, TOP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    n, j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    inside, here = n < rows, j < columns
    row = batch * rows + n
    tile = tl.load(w + row[:, None] * columns + j[None, :], mask=inside[:, None] & here[None, :], other=0.0)
    scale, zero = tl.load(scales + row, mask=inside, other=1.0), tl.load(zeros + row, mask=inside, other=0.0)
    for i in range(columns):
        column = tl.sum(tl.where((j == i)[None, :], tile, 0.0), 1)
        factor = tl.load(u + (batch * columns + i) * columns + j, mask=here, other=0.0)
        code = _codes(column, scale, zero, TOP)
        error = (column - (code - zero) * scale) / tl.sum(tl.where(j == i, factor, 0.0))
        tl.store(codes + row * columns + i, code, mask=inside)
        tl.store(errors + row * columns + i, error, mask=inside)
        tile -= tl.where(j > i, factor, 0.0)[None, :] * error[:, None]


def search_scales(
    w: torch.Tensor, weight: torch.Tensor, *, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as of the op."""
    batch, rows, columns = _sizes(w, bits)
    _expect("weight", weight, (batch, columns), w.device)
    scale, zero = (torch.empty(batch, rows, device=w.device) for _ in range(2))
    # a symmetric grid reaches one step further down than up, so the sign of the scale is a choice too
    signs = (1.0, -1.0) if symmetric else (1.0,)
    shares = torch.tensor([share * sign for share in SHRINKS for sign in signs], device=w.device)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(columns))
    _search[(batch, triton.cdiv(rows, _ROWS))](
        w.contiguous(), weight.contiguous(), shares, scale, zero, rows, columns, len(shares), symmetric, 2**bits - 1,
        _ROWS, block,
    )  # fmt: skip
    return scale, zero


def round_span(
    w: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as of the op."""
    batch, rows, columns = _sizes(w, bits)
    if columns > _MOST_COLUMNS:
        raise InputError.argument("w", expected=f"at most {_MOST_COLUMNS} columns", got=columns)
    _expect("u", u, (batch, columns, columns), w.device)
    for name, x in (("scale", scale), ("zero", zero)):
        _expect(name, x, (batch, rows), w.device)
    codes, errors = (torch.empty(batch, rows, columns, device=w.device) for _ in range(2))
    _span[(batch, triton.cdiv(rows, _ROWS))](
        w.contiguous(), u.contiguous(), scale.contiguous(), zero.contiguous(), codes, errors, rows, columns,
        2**bits - 1, _ROWS, triton.next_power_of_2(columns),
    )  # fmt: skip
    return codes, errors


def _sizes(w: torch.Tensor, bits: int) -> tuple[int, int, int]:
    if bits not in range(2, 9):
        raise InputError.argument("bits", expected="2 to 8", got=bits)
    if w.dim() != 3 or w.dtype != torch.float32:
        raise InputError.argument("w", expected="float32 of 3 dimensions", got=(w.dtype, tuple(w.shape)))
    batch, rows, columns = w.shape
    return batch, rows, columns


def _expect(name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(x.shape) != shape or x.dtype != torch.float32 or x.device != device:
        raise InputError.argument(
            name, expected=f"float32 {shape} on {device}", got=(x.dtype, tuple(x.shape), x.device)
        )
