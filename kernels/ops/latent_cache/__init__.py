"""latent_cache: what multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps of a token, and its queries.

A token's keys and values of all heads are ``kv_b_proj`` of one latent of R values; beside it one rotary key of P values is
shared by all heads. Only these R + P values are cached. With the key half of ``kv_b_proj`` moved to the query ("absorbed",
section 2.1.2), attention runs over the cache as it is: see :mod:`llmopt.ops.latent_attention`. An int8 cache has the latent in
codes: :mod:`llmopt.ops.latent_cache.rows`.

Letters: T tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, n qk_nope_head_dim, V v_head_dim, S sequences, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.attention import attention
from llmopt.ops.device import implementation, registered
from llmopt.ops.latent_cache.rows import latent_codes, latent_parts
from llmopt.ops.latent_cache.weights import absorbed_weights, group_for

__all__ = ["absorbed_weights", "expanded_attention", "latent_cache", "latent_codes", "latent_parts"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "latent_cache(Tensor q, Tensor kv_a, Tensor norm, float eps, Tensor cos, Tensor sin, Tensor position, Tensor seq, "
    "Tensor slot, bool interleaved, int heads, Tensor? w_uk, Tensor(a!) cache, Tensor(b!)? latent_scale=None) -> Tensor"
)


def latent_cache(
    q: torch.Tensor, kv_a: torch.Tensor, norm: torch.Tensor, *, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool, heads: int,
    w_uk: torch.Tensor | None, cache: torch.Tensor, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Writes new tokens into the latent cache and gives their queries.

    The latent is normalized (``kv_a_layernorm``), the rotary parts of key and query are rotated. With ``w_uk`` the rest of
    the query moves into latent space, ``q_nope[h] @ w_uk[h].T``. The compiler aside, nothing is copied: the tensors may
    belong to a program that is being recorded. Inference only.

    Args:
        q: ``[T, H * (n + P)]`` float32, from q_proj or q_b_proj; rows may lie apart, here and in kv_a.
        kv_a: ``[T, R + P]`` float32, from kv_a_proj_with_mqa.
        norm: ``[R]`` float32, the weight of kv_a_layernorm.
        eps: of that norm.
        cos: ``[positions, P / 2]`` float32, with yarn's factor where there is one.
        sin: likewise.
        position: ``[T]`` int32, rows of cos and sin.
        seq: ``[T]`` int32, the sequence of the cache that a token belongs to.
        slot: ``[T]`` int32, its place there.
        interleaved: rotary pairs are neighbours (2i, 2i + 1), not halves (i, i + P / 2).
        heads: H.
        w_uk: ``[H, R, n]`` of a float dtype or 8 bits packed, from :func:`absorbed_weights`; None leaves the query as it is,
            for :func:`expanded_attention`.
        cache: ``[S, C, R + P]`` float32, bfloat16 or float16, or ``[S, C, R + 2 P]`` int8 with an even R, contiguous; written.
        latent_scale: ``[S, C]`` float32, of an int8 cache and of no other; written.

    Returns:
        The query of cache's dtype, bfloat16 beside int8, rotated part last: ``[T, H, R + P]`` with w_uk, else
        ``[T, H, n + P]``.

    Raises:
        InputError: shapes, dtypes or strides do not fit together.
        IndexError: a position, sequence or slot lies outside; not checked while a program is recorded.
        NativeLibraryError: the compiled kernels are not installed.
    """
    args = (q, kv_a, norm, eps, cos, sin, position, seq, slot, interleaved, heads, w_uk, cache, latent_scale)
    if torch.compiler.is_compiling():
        query: torch.Tensor = torch.ops.llmopt.latent_cache(*args)
        return query
    return implementation("latent_cache", _cpu, q)(*args)


def _new_query(q: torch.Tensor, cos: torch.Tensor, heads: int, w_uk: object, cache: torch.Tensor) -> torch.Tensor:
    if q.dim() != 2 or cache.dim() != 3 or heads < 1 or q.shape[1] % heads or cos.dim() != 2:
        raise InputError(
            f"latent_cache: expected q [T, {heads} * (n + P)], cos [positions, P / 2] and cache [S, C, R + P], got "
            f"{list(q.shape)}, {list(cos.shape)} and {list(cache.shape)}"
        )
    codes = cache.dtype == torch.int8
    absorbed = cache.shape[2] - 2 * cos.shape[1] if codes else cache.shape[2]
    shape = (q.shape[0], heads, q.shape[1] // heads if w_uk is None else max(absorbed, 0))
    return cache.new_empty(shape, dtype=torch.bfloat16 if codes else cache.dtype)


def _cpu(
    q: torch.Tensor, kv_a: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool, heads: int,
    w_uk: torch.Tensor | None, cache: torch.Tensor, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    query = _new_query(q, cos, heads, w_uk, cache)
    group = group_for(q.shape[1] // heads - 2 * cos.shape[1])
    try:
        native.library().latent_cache(
            q, kv_a, norm, eps, cos, sin, position, seq, slot, interleaved, w_uk, group, cache, latent_scale, query
        )
    except ValueError as error:
        raise InputError(f"latent_cache: {error}") from None
    return query


def _fake(
    q: torch.Tensor, kv_a: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, interleaved: bool, heads: int,
    w_uk: torch.Tensor | None, cache: torch.Tensor, latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    return _new_query(q, cos, heads, w_uk, cache)


_LIBRARY.impl("latent_cache", _cpu, "CPU")
_LIBRARY.impl("latent_cache", registered("latent_cache"), "CUDA")
torch.library.register_fake("llmopt::latent_cache", _fake, lib=_LIBRARY)


def expanded_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    expand: Callable[[torch.Tensor, int, int], torch.Tensor],
    *,
    seq: int,
    keys: int,
    nope: int,
    rope: int,
    scale: float,
    heads_at_once: int = 4,
    latent_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a prefill chunk in the expanded form: its tokens are the last of ``keys`` tokens in the cache.

    Per pair of query and key it costs n + P + V multiplications a head where the absorbed form costs 2 R + P (320 and 1088 in
    DeepSeek's models), which pays from some dozens of queries on. Heads are expanded a few at a time, so that memory stays at
    ``keys * heads_at_once * (n + V)`` values. Plain torch and :func:`llmopt.ops.attention.attention`: not for recording.

    Args:
        query: ``[T, H, n + P]``, from :func:`latent_cache` without w_uk.
        cache: ``[S, C, R + P]``, or ``[S, C, R + 2 P]`` int8; the chunk's tokens are in it.
        expand: kv_b_proj of some heads: ``expand(latents [keys, R], first, last)`` gives ``[keys, (last - first) * (n + V)]``
            of heads [first, last), by ``F.linear`` on rows of the weight or ``int4_linear`` on its tiles.
        seq: sequence of the cache.
        keys: tokens of it that count, the chunk's own included; query i sees the first ``keys - T + i + 1``.
        nope: n.
        rope: P.
        scale: of the scores, with yarn's factor where there is one.
        heads_at_once: heads to expand at a time.
        latent_scale: ``[S, C]``, of an int8 cache.

    Returns:
        ``[T, H * V]`` of query's dtype.

    Raises:
        InputError: shapes or dtypes do not fit together.
    """
    tokens, heads, dim = query.shape
    if dim != nope + rope or not tokens <= keys <= cache.shape[1] or heads_at_once < 1:
        raise InputError(
            f"expanded_attention: expected query [T, H, {nope + rope}] and T to {cache.shape[1]} keys, got "
            f"{list(query.shape)} and {keys}"
        )
    rank = cache.shape[2] - (rope if latent_scale is None else 2 * rope)
    scales = None if latent_scale is None else latent_scale[seq, :keys]
    latents, k_rope = latent_parts(cache[seq, :keys], scales, rank)
    q_nope, q_rope = query.transpose(0, 1)[None].split([nope, rope], dim=-1)
    parts = []
    for first in range(0, heads, heads_at_once):
        last = min(first + heads_at_once, heads)
        expanded = expand(latents, first, last).view(1, keys, last - first, -1).transpose(1, 2)
        k_nope, value = expanded.tensor_split([nope], dim=-1)
        out = attention(
            q_nope[:, first:last], k_nope, value, scale=scale, q_rope=q_rope[:, first:last], k_rope=k_rope[None, None]
        )
        parts.append(out.view(tokens, -1))
    return torch.cat(parts, dim=1)
