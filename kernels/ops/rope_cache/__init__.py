"""rope_cache: qk-norm, rotary embedding and the write into the KV cache, from the merged q/k/v product.

Rows are tokens of any sequences in any order: each has its rope position, its sequence and its slot in the cache.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered

__all__ = ["rope_cache"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "rope_cache(Tensor qkv, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, Tensor? position, "
    "Tensor seq, Tensor slot, bool interleaved, Tensor(a!) q, Tensor(b!) k, Tensor(c!) v, "
    "Tensor(d!)? k_scale=None, Tensor(e!)? v_scale=None) -> ()"
)


def rope_cache(
    qkv: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cos: torch.Tensor | None,
    sin: torch.Tensor | None, position: torch.Tensor | None, seq: torch.Tensor, slot: torch.Tensor,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 0.0,
    k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Normalize and rotate the heads of q and k, write k and v to the cache, and q beside it.

    Args:
        qkv: ``[T, (H + 2 Hk) * D]`` float32, the heads of q, then k, then v.
        q: ``[T, H, D]`` of the cache's dtype (bfloat16 beside int8), written.
        k: ``[S, Hk, C, D]`` float32, bfloat16, float16 or int8, contiguous; ``k[seq[t], :, slot[t]]`` is written.
        v: likewise.
        cos: ``[positions, R / 2]`` float32, R even and at most D: the first R values of a head are rotated; None with sin and
            position: the heads are rotated already.
        sin: likewise.
        position: ``[T]`` int32, rows of cos and sin.
        seq: ``[T]`` int32, in ``[0, S)``.
        slot: ``[T]`` int32, in ``[0, C)``.
        interleaved: rotate pairs ``(2i, 2i + 1)`` instead of ``(i, i + R / 2)``.
        q_norm: ``[D]`` float32 weight of an RMSNorm on each head of q, or None.
        k_norm: the same for k.
        eps: of both norms.
        k_scale: ``[S, Hk, C]`` float32, of an int8 cache only, written: a head of a token is ``scale * k``.
        v_scale: likewise.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: a position, sequence or slot is out of range.
        NativeLibraryError: the compiled kernels are not installed.
    """
    args = (qkv, q_norm, k_norm, eps, cos, sin, position, seq, slot, interleaved, q, k, v, k_scale, v_scale)
    if torch.compiler.is_compiling():
        torch.ops.llmopt.rope_cache(*args)
    else:
        implementation("rope_cache", _cpu, qkv)(*args)


def _cpu(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, cos: torch.Tensor | None,
    sin: torch.Tensor | None, position: torch.Tensor | None, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    try:
        native.library().rope_cache(
            qkv, q_norm, k_norm, eps, cos, sin, position, seq, slot, interleaved, q, k, v, k_scale, v_scale
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"rope_cache: {error}") from None


def _fake(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, cos: torch.Tensor | None,
    sin: torch.Tensor | None, position: torch.Tensor | None, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    width = (q.shape[1] + 2 * k.shape[1]) * q.shape[2]
    torch._check(qkv.shape == (q.shape[0], width), lambda: f"qkv: expected shape {(q.shape[0], width)}")


_LIBRARY.impl("rope_cache", _cpu, "CPU")
_LIBRARY.impl("rope_cache", registered("rope_cache"), "CUDA")
torch.library.register_fake("llmopt::rope_cache", _fake, lib=_LIBRARY)
