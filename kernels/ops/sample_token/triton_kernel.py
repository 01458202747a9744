"""sample_token on NVIDIA GPUs: each part of a row keeps its largest logits, then one program filters those and draws.

A filter is the largest threshold that enough logits, or weights of them, reach: found bit by bit, in a fixed order, without
sorting. What a part has dropped is below its bound. Where a threshold falls under that of any part (many logits pass, which
top-p alone may lead to), the row itself is searched in the same way, by one program.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError

# logits that a part keeps; more than any usual top_k
_KEPT = 64
_BLOCK = 4096
_MOST_PARTS = 64
# of a row that has to be searched whole: more would spill beside what the parts have kept
_ROW_BLOCK = 2048
# weights have no floor here, but noise has one everywhere
_LEAST_NOISE = tl.constexpr(1e-20)

# whole numbers that a kernel is not compiled anew for
_SIZES = ("vocab", "parts")

_NOTHING = tl.constexpr(-0x80000000)


@triton.jit
def _ordered(x):
    """Whole numbers in the order of float32 values: int32, all above ``_NOTHING``."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # -0.0 and 0.0 are equals
    return tl.where(x == 0, 0, ordered)


@triton.jit
def _settings(settings, row, stride, vocab):
    """1 / temperature, top_k (V: all), top_p (1: all), min_p (0: all)."""
    at = settings + row * stride
    temperature, k, p, min_p = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    scale = tl.where(temperature > 1e-37, 1.0 / tl.maximum(temperature, 1e-37), 3.4028235e38)
    k = tl.where((k >= 1) & (k < vocab), k, vocab.to(tl.float32)).to(tl.int32)
    return scale, k, tl.where(p < 1, p, 1.0), tl.where(min_p > 0, min_p, 0.0)


@triton.jit
def _threshold(ordered, measure, target):
    """The largest number that values of ``ordered`` with a ``measure`` of at least ``target`` reach, or ``_NOTHING``."""
    found = tl.full([], _NOTHING, tl.int64)
    for i in range(32):
        tried = found + (tl.full([], 1, tl.int64) << (31 - i))
        reached = tl.sum(tl.where(ordered >= tried.to(tl.int32), measure, 0))
        found = tl.where(reached >= target, tried, found)
    return found.to(tl.int32)


@triton.jit
def _row_threshold(x, vocab, largest, scale, least, target, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The same over a whole row: of counts, or of the weights of what is at least ``least``."""
    found = tl.full([], _NOTHING, tl.int64)
    for i in range(32):
        tried = found + (tl.full([], 1, tl.int64) << (31 - i))
        reached = _row_measure(x, vocab, largest, scale, tl.maximum(tried.to(tl.int32), least), BY_COUNT, BLOCK)
        found = tl.where(reached >= target, tried, found)
    return found.to(tl.int32)


@triton.jit
def _row_measure(x, vocab, largest, scale, least, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.int32 if BY_COUNT else tl.float32)
    for begin in range(0, vocab, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < vocab, other=float("-inf"))
        passes = (i < vocab) & (_ordered(value) >= least)
        sums += tl.where(passes, 1 if BY_COUNT else tl.exp((value - largest) * scale), 0)
    return tl.sum(sums)


@triton.jit
def _chance(value, largest, scale, noise):
    """The logarithm of weight / noise, up to what all have in common."""
    return (value - largest) * scale - tl.log(tl.maximum(noise, _LEAST_NOISE))


@triton.jit
def _first_largest(chance, index):
    """The largest chance, and of equals the smallest index."""
    best = tl.max(chance)
    return best, tl.min(tl.where(chance == best, index, 0x7FFFFFFF))


@triton.jit(do_not_specialize=_SIZES)
def _parts(
    logits, noise, settings, kept, places, counts, bounds, maxima, masses, chances, firsts, vocab, logits_stride,
    noise_stride, settings_stride, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What one program has to know of a part: its largest logits, and the bound of all others; mass and draw of them all."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    scale, k, p, min_p = _settings(settings, row, settings_stride, vocab)
    at, i = row * parts + part, part * BLOCK + tl.arange(0, BLOCK)
    inside = i < vocab
    x = tl.load(logits + row * logits_stride + i, mask=inside, other=float("-inf"))
    nan = tl.max((x != x).to(tl.int32))
    largest = tl.where(nan > 0, float("nan"), tl.max(tl.where(x != x, float("-inf"), x)))
    tl.store(maxima + at, largest)
    # where all is -inf nothing can be drawn, and no difference may be taken
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    if (k == vocab) & (p == 1) & (min_p == 0):
        q = tl.load(noise + row * noise_stride + i, mask=inside, other=1.0)
        chance, first = _first_largest(tl.where(inside, _chance(x, shift, scale, q), float("-inf")), i)
        tl.store(chances + at, chance)
        tl.store(firsts + at, first)
    else:
        tl.store(masses + at, tl.sum(tl.where(inside, tl.exp((x - shift) * scale), 0.0)))
        ordered = tl.where(inside, _ordered(x), _NOTHING)
        bound = _threshold(ordered, tl.full([BLOCK], 1, tl.int32), KEPT + 1)
        keep = ordered > bound
        slot = at * KEPT + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept + slot, x, mask=keep)
        tl.store(places + slot, i, mask=keep)
        tl.store(counts + at, tl.sum(keep.to(tl.int32)))
        tl.store(bounds + at, bound)


@triton.jit(do_not_specialize=_SIZES)
def _choose(
    logits, noise, settings, kept, places, counts, bounds, maxima, masses, chances, firsts, ids, chosen, vocab, parts,
    logits_stride, noise_stride, settings_stride, KEPT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale, k, p, min_p = _settings(settings, row, settings_stride, vocab)
    part = tl.arange(0, PARTS)
    real, at = part < parts, row * parts + part
    maximum = tl.load(maxima + at, mask=real, other=float("-inf"))
    nan = tl.max((maximum != maximum).to(tl.int32)) > 0
    largest = tl.max(tl.where(maximum != maximum, float("-inf"), maximum))
    if nan | (largest == float("-inf")) | (largest == float("inf")):
        tl.store(ids + row, 0)
        if CHOSEN:
            tl.store(chosen + row, -1)
    else:
        if (k == vocab) & (p == 1) & (min_p == 0):
            chance = tl.load(chances + at, mask=real, other=float("-inf")) + (maximum - largest) * scale
            _, token = _first_largest(chance, tl.load(firsts + at, mask=real, other=0x7FFFFFFF))
        else:
            mass = tl.load(masses + at, mask=real, other=0.0)
            mass = tl.sum(tl.where(maximum == float("-inf"), 0.0, mass * tl.exp((maximum - largest) * scale)))
            bound = tl.max(tl.load(bounds + at, mask=real, other=_NOTHING))
            slot = tl.arange(0, PARTS * KEPT)
            filled = tl.load(counts + row * parts + slot // KEPT, mask=slot < parts * KEPT, other=0)
            there = slot % KEPT < filled
            slot += row * parts * KEPT
            x = tl.load(kept + slot, mask=there, other=float("-inf"))
            place = tl.load(places + slot, mask=there, other=0x7FFFFFFF)
            ordered = tl.where(there, _ordered(x), _NOTHING)
            token = _among_kept(
                x, ordered, place, bound, mass, largest, logits + row * logits_stride, noise + row * noise_stride, vocab,
                scale, k, p, min_p, PARTS * KEPT, BLOCK,
            )  # fmt: skip
        tl.store(ids + row, token.to(tl.int64))
        if CHOSEN:
            tl.store(chosen + row, token.to(tl.int64))


@triton.jit
def _among_kept(
    x, ordered, place, bound, mass, largest, logits, noise, vocab, scale, k, p, min_p, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The token, from what the parts have kept if no threshold falls under what they have not, or else from the row."""
    weight = tl.where(ordered > _NOTHING, tl.exp((x - largest) * scale), 0.0)
    least = tl.full([], _NOTHING, tl.int32)
    complete = True
    if k < vocab:
        least = _threshold(ordered, tl.full([COUNT], 1, tl.int32), k)
        complete = least > bound
        mass = tl.sum(tl.where(ordered >= least, weight, 0.0))
    if p < 1:
        least = tl.maximum(least, _threshold(ordered, tl.where(ordered >= least, weight, 0.0), p * mass))
    least = tl.minimum(least, _ordered(largest))
    # what min_p drops for certain; weights themselves decide
    light = _ordered(largest + (tl.log(tl.maximum(min_p, 1e-37)) - 1e-3) / scale)
    light = tl.where((min_p > 0) & (min_p <= 1), light, tl.where(min_p > 1, _ordered(largest), _NOTHING))
    if complete & (tl.maximum(least, light) > bound):
        keep = (ordered >= least) & ((weight >= min_p) | (x == largest))
        q = tl.load(noise + place, mask=keep, other=1.0)
        _, token = _first_largest(tl.where(keep, _chance(x, largest, scale, q), float("-inf")), place)
    else:
        token = _among_all(logits, noise, vocab, largest, scale, k, p, min_p, mass, BLOCK)
    return token


@triton.jit
def _among_all(logits, noise, vocab, largest, scale, k, p, min_p, mass, BLOCK: tl.constexpr):
    least = tl.full([], _NOTHING, tl.int32)
    if k < vocab:
        least = _row_threshold(logits, vocab, largest, scale, least, k, True, BLOCK)
        mass = _row_measure(logits, vocab, largest, scale, least, False, BLOCK)
    if p < 1:
        least = tl.maximum(least, _row_threshold(logits, vocab, largest, scale, least, p * mass, False, BLOCK))
    least = tl.minimum(least, _ordered(largest))
    best, token = tl.full([], float("-inf"), tl.float32), tl.full([], 0x7FFFFFFF, tl.int32)
    for begin in range(0, vocab, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < vocab, other=float("-inf"))
        keep = (i < vocab) & (_ordered(x) >= least)
        keep &= (tl.exp((x - largest) * scale) >= min_p) | (x == largest)
        q = tl.load(noise + i, mask=keep, other=1.0)
        chance, first = _first_largest(tl.where(keep, _chance(x, largest, scale, q), float("-inf")), i)
        token = tl.where(chance > best, first, token)
        best = tl.maximum(chance, best)
    return token


def run(
    logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor | None
) -> None:
    """Arguments as of the torch op."""
    _check(logits, noise, settings, ids, chosen)
    rows, vocab = logits.shape
    block = max(_BLOCK, triton.next_power_of_2(triton.cdiv(vocab, _MOST_PARTS)))
    parts = triton.cdiv(vocab, block)
    made = partial(torch.empty, rows, parts, device=logits.device)
    kept = torch.empty(rows, parts, _KEPT, device=logits.device)
    places = torch.empty_like(kept, dtype=torch.int32)
    maxima, masses, chances = made(), made(), made()
    counts, bounds, firsts = (made(dtype=torch.int32) for _ in range(3))
    if not rows:
        return
    held = (kept, places, counts, bounds, maxima, masses, chances, firsts)
    strides = (logits.stride(0), noise.stride(0), settings.stride(0))
    _parts[(rows, parts)](logits, noise, settings, *held, vocab, *strides, _KEPT, block, num_warps=16)
    _choose[(rows,)](
        logits, noise, settings, *held, ids, chosen, vocab, parts, *strides, _KEPT, triton.next_power_of_2(parts), _ROW_BLOCK,
        chosen is not None, num_warps=8,
    )  # fmt: skip


def _check(
    logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor | None
) -> None:
    if logits.dim() != 2 or not logits.shape[1]:
        raise InputError.argument("sample_token: logits", expected="[T, V]", got=tuple(logits.shape))
    shapes = {
        "logits": (logits, logits.shape),
        "noise": (noise, logits.shape),
        "settings": (settings, (len(logits), 4)),
    }
    for name, (given, shape) in shapes.items():
        dense = given.dim() == 2 and given.stride(1) == 1
        if given.dtype != torch.float32 or given.shape != shape or not dense:
            wanted = f"float32 {list(shape)}, its last dimension dense"
            raise InputError.argument(f"sample_token: {name}", expected=wanted, got=(given.dtype, tuple(given.shape)))
    for name, out in (("ids", ids), ("chosen", chosen)):
        if out is not None and (out.dtype != torch.int64 or out.shape != logits.shape[:1] or not out.is_contiguous()):
            wanted = f"int64 [{len(logits)}]"
            raise InputError.argument(f"sample_token: {name}", expected=wanted, got=(out.dtype, tuple(out.shape)))
