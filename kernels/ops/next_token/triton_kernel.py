"""next_token on NVIDIA GPUs: the maximum of each part of the logits, then of the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError

_BLOCK = 4096


@triton.jit
def _ordered(x):
    """Whole numbers in the order of float32 values, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # -0.0 and 0.0 are equals
    ordered = tl.where(x == 0, 0, ordered)
    return tl.where(x != x, 0x7FFFFFFF, ordered).to(tl.int64)


@triton.jit
def _best(value, index):
    """The largest value with the smallest index, as one number."""
    return tl.max((value << 32) | (0x7FFFFFFF - index).to(tl.int64))


@triton.jit
def _parts(logits, best, vocab, stride, BLOCK: tl.constexpr):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + token * stride + i, mask=i < vocab, other=float("-inf"))
    # what lies beyond the vocabulary comes after everything in it
    value = tl.where(i < vocab, _ordered(x), -0x7FFFFFFF)
    tl.store(best + token * tl.num_programs(1) + part, _best(value, i))


@triton.jit
def _whole(best, ids, parts, BLOCK: tl.constexpr):
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    found = tl.max(tl.load(best + token * parts + i, mask=i < parts, other=-0x7FFFFFFFFFFFFFFF))
    tl.store(ids + token, 0x7FFFFFFF - (found & 0xFFFFFFFF))


def run(logits: torch.Tensor, ids: torch.Tensor) -> None:
    """Arguments as of the torch op."""
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1 or not logits.shape[1]:
        raise InputError.argument(
            "next_token: logits", expected="[T, V] float32, its last dimension dense", got=tuple(logits.shape)
        )
    if ids.dtype != torch.int64 or ids.shape != logits.shape[:1] or not ids.is_contiguous():
        raise InputError.argument("next_token: ids", expected=f"int64 [{logits.shape[0]}]", got=tuple(ids.shape))
    tokens, vocab = logits.shape
    parts = triton.cdiv(vocab, _BLOCK)
    best = torch.empty(tokens, parts, dtype=torch.int64, device=logits.device)
    if tokens:
        _parts[(tokens, parts)](logits, best, vocab, logits.stride(0), _BLOCK, num_warps=4)
        _whole[(tokens,)](best, ids, parts, triton.next_power_of_2(parts), num_warps=1)
