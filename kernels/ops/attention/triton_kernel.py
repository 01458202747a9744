"""attention on NVIDIA GPUs: FlashAttention-2 (Dao 2023, arXiv 2307.08691), a program a block of queries of one head.

Blocks of keys that all queries of a program see come first and need no mask; those on the diagonal, in a window's edge or under
a mask of the caller's are masked. Scores are powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from llmopt.errors import InputError
from llmopt.ops import attention
from llmopt.ops.cache_attention.triton_kernel import further, scored

_LOG2E = 1.4426950408889634


@triton.jit
def _load(pointers, keys, columns, KEYS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of keys or values; what does not need a mask has none, which saves registers."""
    if KEYS and COLUMNS:
        return tl.load(pointers, mask=keys & columns, other=0.0)
    if KEYS:
        return tl.load(pointers, mask=keys, other=0.0)
    if COLUMNS:
        return tl.load(pointers, mask=columns, other=0.0)
    return tl.load(pointers)


@triton.jit
def _blocks(
    low, high, query, query_rope, k, v, k_rope, key_mask, mask, m, total, acc, i, offset, scale, queries, keys, k_row,
    v_row, rope_row, mask_row, mask_col, dim, v_dim, rope, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    KEY_MASK: tl.constexpr, MASK: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, PRECISE: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from ``low`` to below ``high``; ``MASKED``: some of their keys are not seen by some query; ``ODD``: heads
    are narrower than their blocks."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for at in range(low, high, BLOCK_N):
        n = tl.arange(0, BLOCK_N)
        # rows of many heads' keys: their number times their length may be more than 32 bits hold
        j, far = at + n, tl.cast(at, tl.int64)
        here = j < keys
        block = _load(k + far * k_row + n[None, :] * k_row + d[:, None], here[None, :], (d < dim)[:, None], MASKED, ODD)
        scores = scored(query, block, scale, PRECISE)
        if ROPE:
            r = tl.arange(0, BLOCK_R)
            turned = _load(
                k_rope + far * rope_row + n[None, :] * rope_row + r[:, None],
                here[None, :],
                (r < rope)[:, None],
                MASKED,
                ODD,
            )
            scores += scored(query_rope, turned, scale, PRECISE)
        reached = here
        if MASKED:
            seen = here[None, :] & (i < queries)[:, None]
            if CAUSAL:
                seen &= j[None, :] <= (i + offset)[:, None]
            if WINDOW:
                seen &= j[None, :] > (i + offset - window)[:, None]
            if KEY_MASK:
                reached = here & (tl.load(key_mask + j, mask=here, other=0) != 0)
                seen &= reached[None, :]
            if MASK:
                seen &= (
                    tl.load(
                        mask + i.to(tl.int64)[:, None] * mask_row + far * mask_col + n[None, :] * mask_col,
                        mask=(i < queries)[:, None] & here[None, :],
                        other=0,
                    )
                    != 0
                )
            scores = tl.where(seen, scores, float("-inf"))
            # a value that no query of the program sees must not count, even as zero times NaN
            reached = tl.max(seen.to(tl.int32), 0) != 0
        values = _load(
            v + far * v_row + n[:, None] * v_row + dv[None, :], reached[:, None], (dv < v_dim)[None, :], MASKED, ODD
        )
        m, total, acc = further(scores, values, 1.0, m, total, acc, PRECISE)
    return m, total, acc


@triton.jit
def _attention(
    q, k, v, q_rope, k_rope, key_mask, mask, out, scale, heads, group, rope_group, queries, keys, dim, v_dim, rope,
    window, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, qr_b, qr_h, qr_row, kr_b, kr_h, kr_row, km_b, m_b, m_h,
    m_row, m_col, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEY_MASK: tl.constexpr, MASK: tl.constexpr,
    ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISE: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    i, d, dv, r = (
        first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    )  # fmt: skip
    valid = i < queries
    query = tl.load(
        q + batch * q_b + head * q_h + i[:, None] * q_row + d[None, :], mask=valid[:, None] & (d < dim)[None, :],
        other=0.0,
    )  # fmt: skip
    query_rope = query
    if ROPE:
        query_rope = tl.load(
            q_rope + batch * qr_b + head * qr_h + i[:, None] * qr_row + r[None, :],
            mask=valid[:, None] & (r < rope)[None, :], other=0.0,
        )  # fmt: skip
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    k_rope += batch * kr_b + head // rope_group * kr_h
    key_mask += batch * km_b
    mask += batch * m_b + head * m_h
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    offset = keys - queries
    end = tl.minimum(keys, first + BLOCK_M + offset) if CAUSAL else keys
    low = keys * 0
    if WINDOW:
        low = tl.maximum(low, (first + offset - window + 1) // BLOCK_N * BLOCK_N)
    # keys that all of these queries see, in whole blocks
    plain = low
    if not (WINDOW or KEY_MASK or MASK):
        plain = tl.maximum(0, tl.minimum(keys, first + offset + 1) if CAUSAL else keys) // BLOCK_N * BLOCK_N
        m, total, acc = _blocks(
            low, plain, query, query_rope, k, v, k_rope, key_mask, mask, m, total, acc, i, offset, scale, queries, keys,
            k_row, v_row, kr_row, m_row, m_col, dim, v_dim, rope, window, CAUSAL, WINDOW, KEY_MASK, MASK, ROPE, False,
            BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_R, PRECISE, ODD,
        )  # fmt: skip
    m, total, acc = _blocks(
        plain, end, query, query_rope, k, v, k_rope, key_mask, mask, m, total, acc, i, offset, scale, queries, keys,
        k_row, v_row, kr_row, m_row, m_col, dim, v_dim, rope, window, CAUSAL, WINDOW, KEY_MASK, MASK, ROPE, True,
        BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_R, PRECISE, ODD,
    )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)
    at = ((batch * queries + i) * heads + head)[:, None] * v_dim + dv[None, :]
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None] & (dv < v_dim)[None, :])


def _timed(call: Callable[[], object], quantiles: list[float]) -> Any:
    if hasattr(triton.runtime.driver.active, "get_benchmarker"):
        return triton.testing.do_bench(call, quantiles=quantiles)
    call()  # compiled ahead of time
    return [1.0] * len(quantiles)


def _fitting(configs: list[triton.Config], named: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Blocks that spill no registers, by benchmarks/triton_aot.py: of GPUs Hopper has the most room."""
    if triton.knobs.runtime.interpret:
        return configs[-1:]
    arch = triton.runtime.driver.active.get_current_target().arch
    wide, parted = max(named["dim"], named["v_dim"]) > 128, named["rope"] > 0
    if arch < 90:
        most = 64 * 32 if wide else 64 * 64
    elif arch == 90:
        most = 128 * 64 if wide or parted else 128 * 128
    else:
        most = 64 * 64 if wide or parted else 128 * 64
    return [c for c in configs if c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] <= most]


# for many queries; chosen by time for each kind of head and mask, when first met
_tuned = triton.autotune(
    [
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2),
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    ],
    key=["dim", "v_dim", "rope", "CAUSAL", "WINDOW", "KEY_MASK", "MASK"],
    prune_configs_by={"early_config_prune": _fitting},
    do_bench=_timed,
)(_attention)


def _strides(x: torch.Tensor | None, count: int) -> list[int]:
    return [0] * count if x is None else list(x.stride()[:count])


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = True, window: int | None = None,
    key_mask: torch.Tensor | None = None, mask: torch.Tensor | None = None, q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as of the torch op."""
    _check(q, k, v, q_rope, k_rope)
    batch, heads, queries, dim = q.shape
    keys, v_dim, rope = k.shape[2], v.shape[3], 0 if q_rope is None else q_rope.shape[3]
    out = torch.empty(batch, queries, heads, v_dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    key_mask, mask = (None if x is None else x.to(torch.uint8) for x in (key_mask, mask))
    m_b, m_h, m_row, m_col = [0] * 4 if mask is None else mask.expand(batch, heads, -1, -1).stride()
    block_d, block_v = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
    block_r = max(16, triton.next_power_of_2(rope))
    precise = q.dtype == torch.float32
    widest = max(block_d, block_v)
    tuned = queries >= attention.MANY_QUERIES and not precise and widest <= 256
    kernel, blocks = _tuned, dict[str, int]()
    if not tuned:
        block_n = 16 if precise or widest > 256 else 32 if widest + rope >= 128 else 64
        most = 16 if precise or widest > 256 else 64
        block_m = max(16, min(most, triton.next_power_of_2(queries)))
        kernel, blocks = _attention, {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8 if widest > 256 else 4,
                                      "num_stages": 2}  # fmt: skip
    given = [q if x is None else x for x in (q_rope, k_rope, key_mask, mask)]
    kernel[lambda meta: (batch * heads, triton.cdiv(queries, meta["BLOCK_M"]))](
        q, k, v, *given, out, scale * _LOG2E, heads, heads // k.shape[1], heads // (1 if k_rope is None else k_rope.shape[1]),
        queries, keys, dim, v_dim, rope, window or 0, *_strides(q, 3), *_strides(k, 3), *_strides(v, 3),
        *_strides(q_rope, 3), *_strides(k_rope, 3), *_strides(key_mask, 1), m_b, m_h, m_row, m_col,
        causal, window is not None, key_mask is not None, mask is not None, q_rope is not None, BLOCK_D=block_d,
        BLOCK_V=block_v, BLOCK_R=block_r, PRECISE=precise, ODD=(dim, v_dim, rope or block_r) != (block_d, block_v, block_r),
        **blocks,
    )  # fmt: skip
    return out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_rope: torch.Tensor | None, k_rope: torch.Tensor | None
) -> None:  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v), ("q_rope", q_rope), ("k_rope", k_rope)):
        if x is not None and (x.dim() != 4 or x.stride(3) != 1 or x.dtype != q.dtype):
            raise InputError.argument(f"attention: {name}", expected=f"4 dimensions of {q.dtype}", got=tuple(x.shape))
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1] or not k.shape[2]:
        raise InputError.argument("attention: k, v", expected=f"heads of {q.shape[3]}", got=(*k.shape, *v.shape))
