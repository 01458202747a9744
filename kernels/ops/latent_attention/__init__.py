"""latent_attention: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over its cache, in the absorbed form.

All heads share one latent "head": a row of the cache is the key, and its first R values are the value. The cache is read
once for both; sixteen query heads lie side by side in the lanes, so that the work runs at the speed of the multiplications.
In bfloat16 the products are of bfloat16 where the processor is fast at that, and weights are rounded to it, as eager
attention rounds them. Beside an int8 cache the products are of bytes there: queries and weights are rounded to 8 bits as well.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered

__all__ = ["latent_attention"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "latent_attention(Tensor query, Tensor cache, Tensor seq, Tensor slot, float scale, int rank, "
    "Tensor? start=None, Tensor? latent_scale=None) -> Tensor"
)


def latent_attention(
    query: torch.Tensor, cache: torch.Tensor, *, seq: torch.Tensor, slot: torch.Tensor, scale: float, rank: int,
    start: torch.Tensor | None = None, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``softmax(scale * query @ keys.T) @ keys[:, :rank]`` of ragged tokens, for decode and short chunks.

    A token sees its sequence's slots up to its own, and nothing it does not see has influence on it, not even a NaN. Sums are
    float32. Neither the number of threads nor other sequences in the batch change a bit of the result. Nothing is
    copied: the tensors may belong to a program that is being recorded.

    Args:
        query: ``[T, H, R + P]`` of cache's dtype, bfloat16 beside int8, contiguous, from
            :func:`llmopt.ops.latent_cache.latent_cache`. Tokens of one sequence at consecutive slots, one after the other,
            share the reading of their keys.
        cache: ``[S, C, R + P]`` float32, bfloat16 or float16, or ``[S, C, R + 2 P]`` int8 (see there), contiguous.
        seq: ``[T]`` int32, sequences.
        slot: ``[T]`` int32, places in them.
        scale: factor on the scores, with yarn's factor where there is one.
        rank: R.
        start: ``[S]`` int32, the first slot that a sequence's rows see (left padding lies before it), or None: 0.
        latent_scale: ``[S, C]`` float32, of an int8 cache and of no other.

    Returns:
        ``[T, H, R]`` float32.

    Raises:
        InputError: shapes, dtypes or strides do not fit together.
        IndexError: a sequence or slot lies outside the cache; not checked while a program is recorded.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if torch.compiler.is_compiling():
        out: torch.Tensor = torch.ops.llmopt.latent_attention(query, cache, seq, slot, scale, rank, start, latent_scale)
        return out
    return implementation("latent_attention", _cpu, query)(query, cache, seq, slot, scale, rank, start, latent_scale)


def _cpu(
    query: torch.Tensor, cache: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, scale: float, rank: int,
    start: torch.Tensor | None = None, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    if query.dim() != 3 or rank < 1:
        raise InputError(
            f"latent_attention: expected query [T, H, R + P] and a rank of 1 or more, got {list(query.shape)} and {rank}"
        )
    out = torch.empty(query.shape[0], query.shape[1], rank)
    try:
        native.library().latent_attention(query, cache, latent_scale, seq, slot, start, scale, out)
    except ValueError as error:
        raise InputError(f"latent_attention: {error}") from None
    return out


def _fake(
    query: torch.Tensor, cache: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, scale: float, rank: int,
    start: torch.Tensor | None = None, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    rope = (cache.shape[2] - rank) // (1 if latent_scale is None else 2)
    torch._check(query.shape[2] == rank + rope, lambda: f"query: expected {rank + rope} columns")
    return query.new_empty(query.shape[0], query.shape[1], rank, dtype=torch.float32)


_LIBRARY.impl("latent_attention", _cpu, "CPU")
_LIBRARY.impl("latent_attention", registered("latent_attention"), "CUDA")
torch.library.register_fake("llmopt::latent_attention", _fake, lib=_LIBRARY)
