"""cache_attention: causal grouped-query attention of ragged rows over the preallocated KV cache.

Rows of one sequence with slots that follow each other form one run: a chunk of a prompt, or the one token of a decode step.
Each row sees its sequence's cache up to its own slot. Runs are cut into jobs over heads, rows and keys (FlashAttention-2 and
flash decoding, on the loops of :mod:`llmopt.ops.attention`).
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered

__all__ = ["cache_attention"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "cache_attention(Tensor q, Tensor k, Tensor v, Tensor seq, Tensor slot, Tensor? start, float scale, Tensor(a!) out, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()"
)


def cache_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *, seq: torch.Tensor, slot: torch.Tensor,
    scale: float, start: torch.Tensor | None = None, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """``out[t] = softmax(scale * q[t] @ keys.T) @ values``: slots ``start .. slot[t]`` of sequence ``seq[t]``, head by head.

    Args:
        q: ``[T, H, D]`` of the cache's dtype (bfloat16 beside int8), contiguous.
        k: ``[S, Hk, C, D]`` float32, bfloat16, float16 or int8, contiguous, Hk a divisor of H.
        v: likewise.
        out: ``[T, H * D]`` of q's dtype, contiguous, written.
        seq: ``[T]`` int32, in ``[0, S)``.
        slot: ``[T]`` int32, in ``[0, C)``.
        scale: factor on the scores.
        start: ``[S]`` int32, the first slot that a sequence's rows see (left padding lies before it), or None: 0.
        k_scale: ``[S, Hk, C]`` float32, of an int8 cache only: a head of a token is ``scale * k``.
        v_scale: likewise.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: a sequence or slot is out of range.
        NativeLibraryError: the compiled kernels are not installed.
    """
    args = (q, k, v, seq, slot, start, scale, out, k_scale, v_scale)
    if torch.compiler.is_compiling():
        torch.ops.llmopt.cache_attention(*args)
    else:
        implementation("cache_attention", _cpu, q)(*args)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor,
    start: torch.Tensor | None, scale: float, out: torch.Tensor, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    try:
        native.library().cache_attention(q, k, v, seq, slot, start, scale, out, k_scale, v_scale)
    except ValueError as error:
        raise InputError(f"cache_attention: {error}") from None


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor,
    start: torch.Tensor | None, scale: float, out: torch.Tensor, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    width = q.shape[1] * q.shape[2]
    torch._check(out.shape == (q.shape[0], width), lambda: f"out: expected shape {(q.shape[0], width)}")


_LIBRARY.impl("cache_attention", _cpu, "CPU")
_LIBRARY.impl("cache_attention", registered("cache_attention"), "CUDA")
torch.library.register_fake("llmopt::cache_attention", _fake, lib=_LIBRARY)
