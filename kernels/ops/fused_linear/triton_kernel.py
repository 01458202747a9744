"""fused_linear on NVIDIA GPUs: int4 and int8 tiles times a few tokens (one kernel), up to a few hundred (tensor cores), or
more (dequantized once, then cuBLAS). Where rows are too few to keep a GPU's memory busy, a tile's inputs are split as well.

Activations are float16, a token's divided by a power of two so that its largest is below 64, and lie in eight planes: the
i-th of every eight inputs, in pairs of 32 bits (:mod:`llmopt.ops.triton_tiles`). Sums are float32. Weights that are not packed
are torch's to multiply.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

from llmopt.errors import InputError
from llmopt.ops.cache_attention.triton_kernel import MOST_COUNTERS, counter
from llmopt.ops.device import processors
from llmopt.ops.fused_linear.triton_planes import Inputs, prepare
from llmopt.ops.triton_tiles import (
    DOT8,
    Tiles,
    code,
    dot8,
    half_of,
    layout_options,
    product,
    scales_at,
    words_of,
    zeros_at,
)  # fmt: skip

__all__ = ["dequantize", "run"]

STORE, ADD, SWIGLU = 0, 1, 2
MOST_GEMV_TOKENS, MOST_GEMM_TOKENS = 8, 256
_MOST_WEIGHTS, _TILES = 4, 2
# of one tile's inputs; and programs that each of a GPU's processors is to have
_MOST_PARTS, _PROGRAMS = 8, 6
# sizes that differ from weight to weight and from step to step: one kernel serves them all
_SIZES = ("s1", "s2", "s3", "n0", "n1", "n2", "n3", "count")


@triton.jit
def gemv_sums(
    w, first, planes, sums, k8s, begin, end, ASYM: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr,
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr, GROUP8: tl.constexpr, LOW: tl.constexpr, low_at,
    KB: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_T, 16]``: sixteen rows, from row ``first`` on, times the tokens; of the inputs the eights from ``begin`` up to
    ``end``."""
    r = first + tl.arange(0, 16)[None, None, :]
    tile, row = r // 16, r % 16
    token = tl.arange(0, BLOCK_T)[:, None, None]
    tile_at, group_words = tile * TILE, 16 + GROUP8 * 16
    acc = tl.zeros((BLOCK_T, KB, 16), tl.float32)
    for start in range(begin, end, KB):
        a = start + tl.arange(0, KB)[None, :, None]
        here = a < end
        group, within = a // GROUP8, a % GROUP8
        words = tl.load(
            w + tile_at + HEAD + group * group_words + 16 + within * 16 + row, mask=here, other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        seen = here & (token < T)
        x_at = planes + token * 4 * k8s + a
        x0 = tl.load(x_at, mask=seen, other=0)
        x1 = tl.load(x_at + k8s, mask=seen, other=0)
        x2 = tl.load(x_at + 2 * k8s, mask=seen, other=0)
        x3 = tl.load(x_at + 3 * k8s, mask=seen, other=0)
        dots = dot8(words, x0, x1, x2, x3, ASM)
        if BITS == 8 or ASYM:
            eight = tl.load(sums + token * k8s + a, mask=seen, other=0.0)
            if BITS == 8:
                low = tl.load(w + low_at + tile * LOW + a * 16 + row, mask=here, other=0)
                dots = 16 * dots + dot8(low, x0, x1, x2, x3, ASM) + 8 * eight
            if ASYM:
                middle: tl.constexpr = 8 if BITS == 4 else 128
                dots += (middle - zeros_at(w, tile_at, group, row, here)) * eight
        acc += dots * scales_at(w, tile_at, group, row, HEAD, group_words, here)
    return tl.sum(acc, 1)


@triton.jit
def _chosen(block, w0, w1, w2, w3, b0, b1, b2, b3, s1, s2, s3, n0, n1, n2, n3):
    """Which of four weights a block belongs to: its words and biases, rows, first column, and the block within it."""
    w, b, n, column, first = w0, b0, n0, s1 * 0, s1 * 0
    if block >= s1:
        w, b, n, column, first = w1, b1, n1, n0, s1
    if block >= s2:
        w, b, n, column, first = w2, b2, n2, n0 + n1, s2
    if block >= s3:
        w, b, n, column, first = w3, b3, n3, n0 + n1 + n2, s3
    return w, b, n, column, block - first


@triton.jit
def _finish(y, out, at, mask, MODE: tl.constexpr):
    if MODE == 1:
        y += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _put_together(part, block, way, PARTS: tl.constexpr, WAYS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The sums of all parts of a block, in their order."""
    at = tl.arange(0, BLOCK_T)[:, None] * 16 + tl.arange(0, 16)[None, :]
    total = tl.zeros((BLOCK_T, 16), tl.float32)
    for i in range(PARTS):
        total += tl.load(part + ((block * PARTS + i) * WAYS + way) * (BLOCK_T * 16) + at)
    return total


@triton.jit
def _written(
    first, second, by, b, n, column, tile, out, out_stride, BIAS: tl.constexpr, MODE: tl.constexpr, T: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums of a tile to the output: a product's, or of the gate and of the up projection."""
    token, row = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, 16)[None, :]
    y = by * first
    if MODE == 2:
        y = y / (1 + tl.exp(-y)) * (by * second)
    if BIAS:
        y += tl.load(b + tile * 16 + row, mask=tile * 16 + row < n, other=0.0)
    at = token * out_stride + column + tile * 16 + row
    _finish(y, out, at, (token < T) & (tile * 16 + row < n), MODE)


@triton.jit(do_not_specialize=_SIZES)
def _gemv(
    planes, sums, factor, w0, w1, w2, w3, b0, b1, b2, b3, s1, s2, s3, n0, n1, n2, n3, out, out_stride, k8s, low_at, part,
    counters, BIAS: tl.constexpr, MODE: tl.constexpr, ASYM: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr,
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr, GROUP8: tl.constexpr, LOW: tl.constexpr,
    KB: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of sixteen rows times T tokens, or a part of its inputs; of SwiGLU the gate's tile and the up projection's. The
    last of a tile's parts to finish puts them together."""
    token = tl.arange(0, BLOCK_T)[:, None]
    by = tl.load(factor + token, mask=token < T, other=0.0)
    block, split = tl.program_id(0), tl.program_id(1)
    span = tl.cdiv(tl.cdiv(k8s, PARTS), KB) * KB
    begin, end = split * span, tl.minimum(k8s, split * span + span)
    if MODE == 2:
        w, b, n, column, tile, low = w0, b0, n0, s1 * 0, block, low_at
    else:
        w, b, n, column, tile = _chosen(block, w0, w1, w2, w3, b0, b1, b2, b3, s1, s2, s3, n0, n1, n2, n3)
        # where the second plane begins differs from weight to weight
        low = low_at if LOW == 0 else tl.cdiv(n, 16) * TILE
    first = gemv_sums(
        w, tile * 16, planes, sums, k8s, begin, end, ASYM, BITS, T, BLOCK_T, TILE, HEAD, GROUP8, LOW, low, KB, ASM
    )  # fmt: skip
    second = first
    if MODE == 2:
        second = gemv_sums(
            w1, tile * 16, planes, sums, k8s, begin, end, ASYM, BITS, T, BLOCK_T, TILE, HEAD, GROUP8, LOW, low, KB, ASM
        )  # fmt: skip
    if PARTS == 1:
        _written(first, second, by, b, n, column, tile, out, out_stride, BIAS, MODE, T, BLOCK_T)
    else:
        ways: tl.constexpr = 2 if MODE == 2 else 1
        at = (block * PARTS + split) * (ways * BLOCK_T * 16) + token * 16 + tl.arange(0, 16)[None, :]
        tl.store(part + at, first)
        if MODE == 2:
            tl.store(part + BLOCK_T * 16 + at, second)
        tl.debug_barrier()
        done = tl.atomic_add(counters + block, 1, sem="acq_rel")
        if done == PARTS - 1:
            first = _put_together(part, block, 0, PARTS, ways, BLOCK_T)
            second = _put_together(part, block, ways - 1, PARTS, ways, BLOCK_T)
            _written(first, second, by, b, n, column, tile, out, out_stride, BIAS, MODE, T, BLOCK_T)
            tl.store(counters + block, 0)


@triton.jit
def _values(i: tl.constexpr, words, low, ASYM: tl.constexpr, BITS: tl.constexpr, scale, zero):
    """Float16 weights: the i-th input of every eight."""
    middle: tl.constexpr = 8 if BITS == 4 else 128
    codes = code(words, i)
    if BITS == 8:
        codes = 16 * codes + code(low, i)
    value = codes.to(tl.float32) - (zero if ASYM else middle)
    return (value * scale).to(tl.float16)


@triton.jit
def gemm_sums(
    w, first, planes, tokens, seen, n, k8s, ASYM: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
    HEAD: tl.constexpr, GROUP8: tl.constexpr, LOW: tl.constexpr, KB: tl.constexpr, BLOCK_T: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_T, 16 * TILES]``: rows of a weight of n, from row ``first`` on, times the ``tokens`` [BLOCK_T, 1] that are
    ``seen``; eight products of every KB eights of inputs."""
    rows: tl.constexpr = 16 * TILES
    r = first + tl.arange(0, rows)[None, :]
    tile, row = r // 16, r % 16
    tile_at, group_words = tile * TILE, 16 + GROUP8 * 16
    low_at = tl.cdiv(n, 16) * TILE
    acc = tl.zeros((BLOCK_T, rows), tl.float32)
    for start in range(0, k8s, KB):
        a = start + tl.arange(0, KB)[:, None]
        here = (a < k8s) & (r < n)
        group = a // GROUP8
        words = tl.load(w + tile_at + HEAD + group * group_words + 16 + a % GROUP8 * 16 + row, mask=here, other=0)
        scale = scales_at(w, tile_at, group, row, HEAD, group_words, here)
        zero = zeros_at(w, tile_at, group, row, here) if ASYM else scale
        low = tl.load(w + low_at + tile * LOW + a * 16 + row, mask=here, other=0) if BITS == 8 else words
        ax = start + tl.arange(0, KB)[None, :]
        for p in tl.static_range(4):
            x_at = planes + (tokens * 4 + p) * k8s + ax
            pairs = tl.load(x_at, mask=seen & (ax < k8s), other=0)
            even = _values(p % 2 + 4 * (p // 2), words, low, ASYM, BITS, scale, zero)
            acc = product(half_of(pairs, 0), even, acc, False)
            odd = _values(p % 2 + 4 * (p // 2) + 2, words, low, ASYM, BITS, scale, zero)
            acc = product(half_of(pairs, 1), odd, acc, False)
    return acc


@triton.jit(do_not_specialize=_SIZES)
def _gemm(
    planes, factor, w0, w1, w2, w3, b0, b1, b2, b3, s1, s2, s3, n0, n1, n2, n3, out, out_stride, count, k8s,
    BIAS: tl.constexpr, MODE: tl.constexpr, ASYM: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
    HEAD: tl.constexpr, GROUP8: tl.constexpr, LOW: tl.constexpr, KB: tl.constexpr, BLOCK_T: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Some tiles times BLOCK_T tokens, on tensor cores."""
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    seen = token < count
    by = tl.load(factor + token, mask=seen, other=0.0)
    block, rows = tl.program_id(0), 16 * TILES
    if MODE == 2:
        gate = by * gemm_sums(
            w0, block * rows, planes, token, seen, n0, k8s, ASYM, BITS, TILE, HEAD, GROUP8, LOW, KB, BLOCK_T, TILES
        )  # fmt: skip
        up = by * gemm_sums(
            w1, block * rows, planes, token, seen, n0, k8s, ASYM, BITS, TILE, HEAD, GROUP8, LOW, KB, BLOCK_T, TILES
        )  # fmt: skip
        y, n, column = gate / (1 + tl.exp(-gate)) * up, n0, 0
        r = block * rows + tl.arange(0, 16 * TILES)[None, :]
    else:
        w, b, n, column, block = _chosen(block, w0, w1, w2, w3, b0, b1, b2, b3, s1, s2, s3, n0, n1, n2, n3)
        y = by * gemm_sums(
            w, block * rows, planes, token, seen, n, k8s, ASYM, BITS, TILE, HEAD, GROUP8, LOW, KB, BLOCK_T, TILES
        )  # fmt: skip
        r = block * rows + tl.arange(0, 16 * TILES)[None, :]
        if BIAS:
            y += tl.load(b + r, mask=r < n, other=0.0)
    _finish(y, out, token.to(tl.int64) * out_stride + column + r, seen & (r < n), MODE)


@triton.jit
def _dequantize(
    w, out, n, cols, low_at, weight_words, ASYM: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr,
    GROUP8: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """One group of a tile of one of several weights as float16 ``[16, group_size]``."""
    tile, group, weight = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    w += weight * weight_words
    out += weight * n * cols
    a, row = tl.arange(0, GROUP8)[:, None], tl.arange(0, 16)[None, :]
    tile_at, group_words = tile * TILE, 16 + GROUP8 * 16
    words = tl.load(w + tile_at + HEAD + group * group_words + 16 + a * 16 + row)
    low = tl.load(w + low_at + tile * LOW + (group * GROUP8 + a) * 16 + row) if BITS == 8 else words
    every = tl.full((1, 16), 1, tl.int1)
    scale = scales_at(w, tile_at, group, row, HEAD, group_words, every)
    zero = zeros_at(w, tile_at, group, row, every) if ASYM else scale
    r = (tile * 16 + row).to(tl.int64)
    for i in tl.static_range(8):
        k = (group * GROUP8 + a) * 8 + i
        value = _values(i, words, low, ASYM, BITS, scale, zero)
        tl.store(out + r * cols + k, value, mask=(r < n) & (k < cols))


def dequantize(
    packed: torch.Tensor, *, out_features: int, in_features: int, group_size: int, bits: int, asymmetric: bool
) -> torch.Tensor:
    """The weight ``[out_features, in_features]``, float16, or those of ``packed [H, tiles, bytes]`` in one launch."""
    tiles = Tiles.of(out_features, in_features, bits, group_size, asymmetric)
    several = packed.shape[:-2]
    out = torch.empty(*several, out_features, in_features, dtype=torch.float16, device=packed.device)
    words = tiles.count * (tiles.tile + tiles.low)
    _dequantize[(tiles.count, tiles.groups, several.numel())](
        words_of("packed", packed, tiles), out, out_features, in_features, tiles.count * tiles.tile, words,
        **layout_options(tiles, asymmetric, bits), num_warps=1,
    )  # fmt: skip
    return out


def _parts(blocks: int, k8s: int, step: int, device: torch.device) -> int:
    """Into how many parts the inputs are split, so that loads enough are on their way: a program keeps 4 KiB, and a GPU wants
    some 20 KiB for each of its processors. A part has at least four steps; so many blocks have counters."""
    parts = 1
    while parts < _MOST_PARTS and blocks * parts < _PROGRAMS * processors(device) and k8s >= 8 * step * parts:
        parts *= 2
    return parts if blocks <= MOST_COUNTERS else 1


def products(
    inputs: Inputs, weights: list[torch.Tensor], rows: list[int], cols: int, bits: int, asymmetric: bool,
    group_size: int, biases: list[torch.Tensor] | None, mode: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """One launch over one to four weights of one kind, the tokens few enough for it."""
    tokens, k8s = inputs.planes.shape[0], inputs.planes.shape[2]
    tiles = [Tiles.of(n, cols, bits, group_size, asymmetric) for n in rows]
    words = [words_of(f"weights[{i}]", w, t) for i, (w, t) in enumerate(zip(weights, tiles, strict=True))]
    few = tokens <= MOST_GEMV_TOKENS
    per_block = 1 if few else _TILES
    blocks = [triton.cdiv(t.count, per_block) for t in tiles]
    starts = [sum(blocks[:i]) if i < len(blocks) else 2**30 for i in range(1, _MOST_WEIGHTS)]
    pad = _MOST_WEIGHTS - len(words)
    bias = biases or [inputs.factor]
    shared = [
        *words, *words[:1] * pad, *bias, *bias[:1] * (_MOST_WEIGHTS - len(bias)), *starts, *rows, *rows[:1] * pad, out,
        out.stride(0),
    ]  # fmt: skip
    options = {"BIAS": biases is not None, "MODE": mode, **layout_options(tiles[0], asymmetric, bits)}
    grid = blocks[0] if mode == SWIGLU else sum(blocks)
    if few:
        # words of a row at a time: fewer where more is summed, or the sums would not fit the registers
        block_t = triton.next_power_of_2(tokens)
        most = (32 if bits == 8 else 64) // max(1, block_t // 2)
        parts = _parts(grid, k8s, most, out.device)
        ways = 2 if mode == SWIGLU else 1
        partial = torch.empty(grid * parts * ways * block_t * 16 if parts > 1 else 0, device=out.device)
        counts = counter(out.device, grid) if parts > 1 else inputs.factor
        _gemv[(grid, parts)](
            inputs.planes, inputs.sums, inputs.factor, *shared, k8s, tiles[0].count * tiles[0].tile, partial, counts,
            **options, T=tokens, BLOCK_T=block_t, KB=most, PARTS=parts, ASM=DOT8, num_warps=4,
        )  # fmt: skip
        return
    block_t = min(32, max(16, triton.next_power_of_2(tokens)))
    _gemm[(grid, triton.cdiv(tokens, block_t))](
        inputs.planes, inputs.factor, *shared, tokens, k8s, **options, KB=16, BLOCK_T=block_t, TILES=per_block, num_warps=4,
    )  # fmt: skip


def run(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, weights: list[torch.Tensor], rows: list[int],
    bits: list[int], asymmetric: list[int], group_size: int, biases: list[torch.Tensor] | None, epilogue: int,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Arguments as of the torch op."""
    _check(x, weights, rows, epilogue, out)
    kinds = set(zip(bits, map(bool, asymmetric), strict=True))
    tokens, cols = x.shape
    if tokens == 0:
        return
    # the kernels have no biases before SwiGLU
    plain = epilogue == SWIGLU and biases is not None
    if len(kinds) == 1 and bits[0] <= 8 and tokens <= MOST_GEMM_TOKENS and not plain:
        ((b, a),) = kinds
        inputs = prepare(x, norm, eps, group_size, sums=a or b == 8)
        products(inputs, weights, rows, cols, b, a, group_size, biases, epilogue, out)
        return
    values = x.float() if norm is None else functional.rms_norm(x.float(), (cols,), norm, eps)
    made = [
        _product(values, weights[i], rows[i], bits[i], bool(asymmetric[i]), group_size) for i in range(len(weights))
    ]  # fmt: skip
    if biases is not None:
        made = [y + bias for y, bias in zip(made, biases, strict=True)]
    if epilogue == SWIGLU:
        torch.mul(functional.silu(made[0]), made[1], out=out)
        return
    y = made[0] if len(made) == 1 else torch.cat(made, -1)
    out.add_(y) if epilogue == ADD else out.copy_(y)


def _product(
    x: torch.Tensor, weight: torch.Tensor, rows: int, bits: int, asymmetric: bool, group_size: int
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T`` [T, rows] float32 of float32 tokens, however many."""
    tokens, cols = x.shape
    if bits > 8:
        return functional.linear(x.to(weight.dtype), weight).float()
    if tokens <= MOST_GEMM_TOKENS:
        y = torch.empty(tokens, rows, device=x.device)
        inputs = prepare(x, None, 0.0, group_size, sums=asymmetric or bits == 8)
        products(inputs, [weight], [rows], cols, bits, asymmetric, group_size, None, STORE, y)
        return y
    # float16 for the tensor cores, in range whatever the tokens are
    factor = torch.exp2(x.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().ceil() - 6)
    dense = dequantize(
        weight, out_features=rows, in_features=cols, group_size=group_size, bits=bits, asymmetric=asymmetric
    )
    return functional.linear((x / factor).half(), dense).float() * factor


def _check(x: torch.Tensor, weights: list[torch.Tensor], rows: list[int], epilogue: int, out: torch.Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise InputError.argument("fused_linear: x", expected="[T, K], its last dimension dense", got=tuple(x.shape))
    if not 1 <= len(weights) <= _MOST_WEIGHTS or (epilogue == SWIGLU and (len(weights) != 2 or rows[0] != rows[1])):
        wanted = "two of as many rows" if epilogue == SWIGLU else "one to four"
        raise InputError.argument("fused_linear: weights", expected=wanted, got=rows)
    width = rows[0] if epilogue == SWIGLU else sum(rows)
    if tuple(out.shape) != (x.shape[0], width) or out.stride(-1) != 1:
        raise InputError.argument("fused_linear: out", expected=f"{(x.shape[0], width)}", got=tuple(out.shape))
    devices = {t.device for t in (x, out, *weights)}
    if len(devices) > 1:
        raise InputError.argument("fused_linear: tensors", expected="one device", got=sorted(map(str, devices)))
