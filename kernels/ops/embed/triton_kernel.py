"""embed on NVIDIA GPUs: rows of a packed table; those of a plain one are torch's to look up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

from llmopt.errors import InputError
from llmopt.ops.triton_tiles import Tiles, code, layout_options, scales_at, words_of, zeros_at


@triton.jit
def _embed(
    ids, w, out, cols, low_at, ASYM: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr,
    GROUP8: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the table, eight columns a word."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.load(ids + token)
    tile, row = index // 16, index % 16
    a = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = a * 8 < cols
    group, group_words = a // GROUP8, 16 + GROUP8 * 16
    words = tl.load(w + tile * TILE + HEAD + group * group_words + 16 + a % GROUP8 * 16 + row, mask=here, other=0)
    low = tl.load(w + low_at + tile * LOW + a * 16 + row, mask=here, other=0) if BITS == 8 else words
    scale = scales_at(w, tile * TILE, group, row, HEAD, group_words, here)
    zero = 8.0 if BITS == 4 else 128.0
    if ASYM:
        zero = zeros_at(w, tile * TILE, group, row, here)
    for i in tl.static_range(8):
        codes = code(words, i) if BITS == 4 else 16 * code(words, i) + code(low, i)
        tl.store(out + token * cols + a * 8 + i, (codes.to(tl.float32) - zero) * scale, mask=a * 8 + i < cols)


def run(ids: torch.Tensor, table: torch.Tensor, rows: int, bits: int, group_size: int, out: torch.Tensor) -> None:
    """Arguments as of the torch op."""
    if out.dim() != 2 or not out.is_contiguous() or out.shape[0] != ids.shape[0]:
        raise InputError.argument("embed: out", expected=f"contiguous [{ids.shape[0]}, H]", got=tuple(out.shape))
    if bits > 8:
        out.copy_(functional.embedding(ids, table))
        return
    lookup("embed: table", ids, table, rows, bits, group_size, False, out)


def lookup(
    name: str, ids: torch.Tensor, table: torch.Tensor, rows: int, bits: int, group_size: int, asymmetric: bool,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """``out[t] = table[ids[t]]`` [T, H] float32 of a packed table; ids ``[T]`` of an integer dtype."""
    cols = out.shape[1]
    tiles = Tiles.of(rows, cols, bits, group_size, asymmetric)
    block = min(128, triton.next_power_of_2(tiles.groups * group_size // 8))
    if len(ids):
        _embed[(len(ids), triton.cdiv(cols, 8 * block))](
            ids, words_of(name, table, tiles), out, cols, tiles.count * tiles.tile, **layout_options(tiles, asymmetric, bits),
            BLOCK=block, num_warps=1,
        )  # fmt: skip
