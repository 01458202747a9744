"""The packed layout of quantized weights (:mod:`llmopt.ops.int4_linear.layout`) as Triton kernels read it.

A word of 32 bits holds the codes of eight consecutive inputs of one row; the sixteen words of a tile's rows lie side by side.
So a row of words is a row of the other operand of a product once per code, and nothing need be shuffled: inputs are taken in
eight planes, the i-th of every eight (:func:`dot8` takes them in pairs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError
from llmopt.ops.int4_linear import layout

TILE_ROWS = layout.TILE_ROWS
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Eight codes of a word, less 8, times eight inputs in float16 pairs. A code in the low bits of 0x6400 is the number
# 1024 + code, 4 bits higher it is 1024 + 16 * code; no conversion is needed (Kim et al. 2022, arXiv 2211.10017). Four products
# are added in float16, the rest in float32. 0x6408 is 1032, 0x2c00 1/16, 0xd480 -72.
_DOT8 = """{
 .reg .b32 high, a, b, c, d, sum, z, s, o;
 .reg .f16 even, odd;
 .reg .f32 f, g;
 mov.b32 z, 0x64086408;
 mov.b32 s, 0x2c002c00;
 mov.b32 o, 0xd480d480;
 shr.u32 high, $1, 8;
 lop3.b32 a, $1, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 b, high, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 c, $1, 0x00f000f0, 0x64006400, 0xea;
 lop3.b32 d, high, 0x00f000f0, 0x64006400, 0xea;
 sub.f16x2 a, a, z;
 sub.f16x2 b, b, z;
 fma.rn.f16x2 c, c, s, o;
 fma.rn.f16x2 d, d, s, o;
 mul.f16x2 sum, a, $2;
 fma.rn.f16x2 sum, b, $3, sum;
 fma.rn.f16x2 sum, c, $4, sum;
 fma.rn.f16x2 sum, d, $5, sum;
 mov.b32 {even, odd}, sum;
 cvt.f32.f16 f, even;
 cvt.f32.f16 g, odd;
 add.f32 $0, f, g;
}"""
DOT8 = tl.constexpr("" if INTERPRETED.value else _DOT8)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where things lie in a packed weight, in words of 32 bits.

    Attributes:
        count: tiles of 16 rows.
        groups: of a row.
        group_size: inputs that share a scale.
        tile: words of a tile of the first plane.
        head: words before its first group: zero points.
        low: words of a tile of an 8-bit weight's second plane, the low nibbles; 0 for 4 bits.
    """

    count: int
    groups: int
    group_size: int
    tile: int
    head: int
    low: int

    @staticmethod
    def of(rows: int, cols: int, bits: int, group_size: int, asymmetric: bool) -> Tiles:
        """Those of a weight ``[rows, cols]``."""
        groups = -(-cols // group_size)
        low = layout.plane_bytes(cols, group_size) if bits == 8 else 0
        tile = layout.tile_bytes(cols, group_size, bits=bits, asymmetric=asymmetric) - low
        vectors = groups * (layout.LINE + group_size * TILE_ROWS // 2)
        return Tiles(-(-rows // TILE_ROWS), groups, group_size, tile // 4, (tile - vectors) // 4, low // 4)


def words_of(name: str, packed: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """A packed weight as int32 words.

    Raises:
        InputError: it has another shape, is not contiguous, or begins between two words.
    """
    want = (tiles.count, 4 * (tiles.tile + tiles.low))
    if packed.dtype != torch.uint8 or tuple(packed.shape[-2:]) != want or not packed.is_contiguous():
        raise InputError.argument(name, expected=f"contiguous uint8 {want}", got=(packed.dtype, tuple(packed.shape)))
    if packed.data_ptr() % 4:
        raise InputError.argument(name, expected="an address that is a multiple of 4", got=packed.data_ptr() % 4)
    return packed.view(-1).view(torch.int32)


def layout_options(tiles: Tiles, asymmetric: bool, bits: int) -> dict[str, int | bool]:
    """What kernels are compiled for, by the names of their arguments."""
    return {
        "ASYM": asymmetric, "BITS": bits, "TILE": tiles.tile, "HEAD": tiles.head, "GROUP8": tiles.group_size // 8,
        "LOW": tiles.low,
    }  # fmt: skip


@triton.jit
def product(a, b, acc, PRECISE: tl.constexpr):
    """``a @ b + acc`` on tensor cores, sums in float32; ``PRECISE``: float32 operands are multiplied whole."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee" if PRECISE else "tf32")


@triton.jit
def code(words, i: tl.constexpr):
    """The i-th of the eight codes of each word: bytes hold 0 to 3 in their low halves, 4 to 7 in the high ones."""
    return (words >> (8 * (i % 4) + 4 * (i // 4))) & 15


@triton.jit
def half_of(pairs, high: tl.constexpr):
    """One float16 of each pair in 32 bits."""
    return ((pairs >> (16 * high)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def dot8(words, x0, x1, x2, x3, ASM: tl.constexpr):
    """``sum((code - 8) * x)`` of each word in float32; pairs x0 (inputs 0, 2), x1 (1, 3), x2 (4, 6), x3 (5, 7)."""
    if ASM == "":
        total = (code(words, 0) - 8).to(tl.float32) * half_of(x0, 0).to(tl.float32)
        total += (code(words, 1) - 8).to(tl.float32) * half_of(x1, 0).to(tl.float32)
        total += (code(words, 2) - 8).to(tl.float32) * half_of(x0, 1).to(tl.float32)
        total += (code(words, 3) - 8).to(tl.float32) * half_of(x1, 1).to(tl.float32)
        total += (code(words, 4) - 8).to(tl.float32) * half_of(x2, 0).to(tl.float32)
        total += (code(words, 5) - 8).to(tl.float32) * half_of(x3, 0).to(tl.float32)
        total += (code(words, 6) - 8).to(tl.float32) * half_of(x2, 1).to(tl.float32)
        total += (code(words, 7) - 8).to(tl.float32) * half_of(x3, 1).to(tl.float32)
    else:
        total = tl.inline_asm_elementwise(
            ASM, "=f,r,r,r,r,r", [words, x0, x1, x2, x3], dtype=tl.float32, is_pure=True, pack=1
        )
    return total


@triton.jit
def scales_at(words, tile_at, group, row, HEAD: tl.constexpr, GROUP_WORDS: tl.constexpr, mask):
    """Float16 scales of rows and groups of a tile that begins at word ``tile_at``, as float32."""
    halves = words.to(tl.pointer_type(tl.float16))
    return tl.load(halves + 2 * (tile_at + HEAD + group * GROUP_WORDS) + row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def zeros_at(words, tile_at, group, row, mask):
    """Zero points of rows and groups of an asymmetric weight's tile, as float32."""
    points = words.to(tl.pointer_type(tl.uint8))
    return tl.load(points + 4 * tile_at + group * 16 + row, mask=mask, other=0).to(tl.float32)
