"""attention: ``softmax(scale * q @ k.T + mask) @ v`` on the CPU, never holding the scores of a whole row of tiles.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) for many queries, the same loop with its keys split over the threads for few
("flash decoding"). The query heads of one key/value head are processed together, so keys and values are read once and
``repeat_kv`` has no counterpart here.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered

__all__ = ["attention"]

# on a GPU: from here on blocks are chosen by time
MANY_QUERIES = 512

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal=True, int? window=None, Tensor? key_mask=None, "
    "Tensor? mask=None, Tensor? q_rope=None, Tensor? k_rope=None) -> Tensor"
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grouped-query attention. A row that may see no key gives zeros (a softmax over nothing has no value of its own).

    Everything is float32 inside. The last dimension of every tensor is dense, other strides are free. A key that a query
    may not see has no influence on it, even if it holds NaN or Inf. Inference only.

    Args:
        q: ``[B, H, Tq, K]`` float32, bfloat16 or float16.
        k: ``[B, Hk, Tk, K]`` of q's dtype, Hk a divisor of H, Tk at least 1.
        v: ``[B, Hk, Tk, V]`` of q's dtype; V may differ from K, and v may be a view of k.
        scale: factor on the scores.
        causal: query i sees keys up to ``Tk - Tq + i``: the last query sees the last key.
        window: with ``causal``, a query sees no more than this many keys, its own included.
        key_mask: ``[B, Tk]`` bool or uint8, True where a key may be seen.
        mask: ``[B or 1, 1 or H, Tq, Tk]`` bool or uint8, True where a query may see a key; on top of the others.
        q_rope: ``[B, H, Tq, P]`` further part of q: scores are ``q @ k.T + q_rope @ k_rope.T``.
        k_rope: ``[B, 1 or Hk, Tk, P]`` further part of k.

    Returns:
        ``[B, Tq, H, V]`` contiguous, of q's dtype.

    Raises:
        InputError: shapes, dtypes, strides or devices do not fit together, or a gradient is wanted.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if torch.compiler.is_compiling():
        out: torch.Tensor = torch.ops.llmopt.attention(q, k, v, scale, causal, window, key_mask, mask, q_rope, k_rope)
        return out
    return implementation("attention", _cpu, q)(q, k, v, scale, causal, window, key_mask, mask, q_rope, k_rope)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = True, window: int | None = None,
    key_mask: torch.Tensor | None = None, mask: torch.Tensor | None = None, q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise InputError("attention: expected inputs that need no gradient (torch.no_grad()), got one that does")
    if q.dim() != 4 or v.dim() != 4:
        name, tensor = ("q", q) if q.dim() != 4 else ("v", v)
        raise InputError.argument(f"attention: {name}", expected="4 dimensions", got=list(tensor.shape))
    if window is not None and window < 1:
        raise InputError.argument("attention: window", expected="None or at least 1", got=window)
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
    try:
        native.library().attention(q, k, v, q_rope, k_rope, key_mask, mask, scale, causal, window or 0, out)
    except ValueError as error:
        raise InputError(f"attention: {error}") from None
    return out


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = True, window: int | None = None,
    key_mask: torch.Tensor | None = None, mask: torch.Tensor | None = None, q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    torch._check(q.shape[3] == k.shape[3], lambda: f"k: expected head size {q.shape[3]}, got {k.shape[3]}")
    torch._check(k.shape[2] == v.shape[2], lambda: f"v: expected {k.shape[2]} keys, got {v.shape[2]}")
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


_LIBRARY.impl("attention", _cpu, "CPU")
_LIBRARY.impl("attention", registered("attention"), "CUDA")
torch.library.register_fake("llmopt::attention", _fake, lib=_LIBRARY)
