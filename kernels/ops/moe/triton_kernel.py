"""moe on NVIDIA GPUs, without a word to the host: the router's choice in one kernel; a few tokens go to their experts one by
one, many are put in the order of their experts and go in blocks.

A slot is one choice of one token: ``T * k`` of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from llmopt.errors import InputError
from llmopt.ops.fused_linear.triton_kernel import SWIGLU, gemm_sums, gemv_sums
from llmopt.ops.fused_linear.triton_kernel import run as fused_linear
from llmopt.ops.fused_linear.triton_planes import prepare
from llmopt.ops.triton_tiles import DOT8, Tiles, layout_options, words_of

# slots that are taken one by one
MOST_SINGLE_SLOTS = 64
_BLOCK_T, _TILES = 16, 2


@triton.jit
def _route(
    logits, bias, index, weights, experts, group_size, sum_eps, sum_min, scale, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr,
    GROUP_BEST: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token's experts, best first, and their weights."""
    token, e, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    real = e < experts
    x = tl.load(logits + token * experts + e, mask=real, other=float("-inf"))
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-x))
    else:
        scores = tl.exp(x - tl.max(x))
        scores /= tl.sum(scores)
    wanted = scores
    if BIAS:
        wanted += tl.load(bias + e, mask=real, other=0.0)
    wanted = tl.where(real, wanted, float("-inf"))
    if TOPK_GROUP < N_GROUP:
        group = e // group_size
        worth = tl.full((BLOCK,), float("-inf"), tl.float32)
        for g in tl.static_range(N_GROUP):
            inside = tl.where(group == g, wanted, float("-inf"))
            best = tl.max(inside)
            if GROUP_BEST == 2:
                first = tl.min(tl.where(inside == best, e, BLOCK))
                best += tl.max(tl.where(e == first, float("-inf"), inside))
            worth = tl.where((group == g) & real, best, worth)
        open_ = e < 0
        for _ in tl.static_range(TOPK_GROUP):
            left = tl.where(open_, float("-inf"), worth)
            chosen = tl.min(tl.where((left == tl.max(left)) & ~open_, group, BLOCK))
            open_ |= group == chosen
        wanted = tl.where(open_, wanted, float("-inf"))
    kept = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(TOP_K):
        # of a NaN there is no largest: any expert then is as good
        best = tl.minimum(tl.min(tl.where(wanted == tl.max(wanted), e, BLOCK)), experts - 1)
        kept = tl.where(j == i, tl.sum(tl.where(e == best, scores, 0.0)), kept)
        tl.store(index + token * TOP_K + i, best)
        wanted = tl.where(e == best, float("-inf"), wanted)
    if RENORMALIZE:
        kept /= tl.maximum(tl.sum(kept) + sum_eps, sum_min)
    tl.store(weights + token * TOP_K + j, kept * scale, mask=j < TOP_K)


@triton.jit
def _single_gate_up(
    planes, sums, factor, index, w, act, expert_words, inner, k8s, TOP_K: tl.constexpr, ASYM: tl.constexpr,
    BITS: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr, GROUP8: tl.constexpr, LOW: tl.constexpr,
    KB: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sixteen values of one slot's activation."""
    slot, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * 16
    token = slot // TOP_K
    w += tl.load(index + slot).to(tl.int64) * expert_words
    planes += token * 4 * k8s
    sums += token * k8s
    by = tl.load(factor + token)
    gate = by * gemv_sums(w, first, planes, sums, k8s, 0, k8s, ASYM, BITS, 1, 1, TILE, HEAD, GROUP8, LOW, 0, KB, ASM)
    up = by * gemv_sums(
        w, inner + first, planes, sums, k8s, 0, k8s, ASYM, BITS, 1, 1, TILE, HEAD, GROUP8, LOW, 0, KB, ASM
    )  # fmt: skip
    row = first + tl.arange(0, 16)[None, :]
    tl.store(act + slot * inner + row, gate / (1 + tl.exp(-gate)) * up, mask=row < inner)


@triton.jit
def _single_down(
    planes, sums, factor, index, weights, w, h, h_stride, expert_words, hidden, k8s, TOP_K: tl.constexpr,
    ASYM: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr, GROUP8: tl.constexpr,
    LOW: tl.constexpr, KB: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sixteen values of one token, the sum over its experts."""
    token, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * 16
    y = tl.zeros((1, 16), tl.float32)
    for j in range(TOP_K):
        slot = token * TOP_K + j
        expert = w + tl.load(index + slot).to(tl.int64) * expert_words
        by = tl.load(factor + slot) * tl.load(weights + slot)
        y += by * gemv_sums(
            expert, first, planes + slot * 4 * k8s, sums + slot * k8s, k8s, 0, k8s, ASYM, BITS, 1, 1, TILE, HEAD, GROUP8, LOW,
            0, KB, ASM,
        )  # fmt: skip
    row = first + tl.arange(0, 16)[None, :]
    at = h + token * h_stride + row
    tl.store(at, tl.load(at, mask=row < hidden, other=0.0) + y, mask=row < hidden)


@triton.jit
def _grouped(
    planes, factor, order, expert_of, first_of, last_of, w, out, expert_words, n, experts, k8s, up_at, TOP_K: tl.constexpr,
    GATED: tl.constexpr, ASYM: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr,
    GROUP8: tl.constexpr, LOW: tl.constexpr, KB: tl.constexpr, BLOCK_T: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A block of slots of one expert times some of its rows; ``TOP_K``: slots that share a row of the planes."""
    block = tl.program_id(0)
    expert = tl.load(expert_of + block)
    if expert < experts:
        at = tl.load(first_of + block) + tl.arange(0, BLOCK_T)[:, None]
        seen = at < tl.load(last_of + block)
        slot = tl.load(order + at, mask=seen, other=0).to(tl.int64)
        token = slot // TOP_K
        by = tl.load(factor + token, mask=seen, other=0.0)
        w += expert.to(tl.int64) * expert_words
        first = tl.program_id(1) * 16 * TILES
        y = by * gemm_sums(
            w, first, planes, token, seen, up_at + n, k8s, ASYM, BITS, TILE, HEAD, GROUP8, LOW, KB, BLOCK_T, TILES
        )  # fmt: skip
        if GATED:
            up = by * gemm_sums(
                w, up_at + first, planes, token, seen, up_at + n, k8s, ASYM, BITS, TILE, HEAD, GROUP8, LOW, KB, BLOCK_T,
                TILES,
            )  # fmt: skip
            y = y / (1 + tl.exp(-y)) * up
        r = first + tl.arange(0, 16 * TILES)[None, :]
        tl.store(out + slot * n + r, y, mask=seen & (r < n))


def route(
    logits: torch.Tensor, correction_bias: torch.Tensor | None, choice: list[int], weighting: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts ``[T, k]`` int32, best first, and their weights, float32, of contiguous logits ``[T, E]`` float32."""
    tokens, experts = logits.shape
    top_k, sigmoid, n_group, topk_group, group_best = choice
    renormalize, sum_eps, sum_min, scale = weighting
    index = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, device=logits.device)
    _route[(tokens,)](
        logits, logits if correction_bias is None else correction_bias, index, weights, experts, experts // n_group, sum_eps,
        sum_min, scale, top_k, bool(sigmoid), correction_bias is not None, n_group, topk_group, group_best, bool(renormalize),
        triton.next_power_of_2(experts), triton.next_power_of_2(top_k), num_warps=1,
    )  # fmt: skip
    return index, weights


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Slots in the order of their experts, and blocks of them that belong to one expert each; more blocks than there need be,
    since how many is known on the GPU alone."""

    order: torch.Tensor
    expert: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @staticmethod
    def of(index: torch.Tensor, experts: int) -> _Blocks:
        flat = index.flatten().long()
        slots = len(flat)
        counts = torch.zeros(experts, dtype=torch.int64, device=index.device).scatter_add_(
            0, flat, torch.ones_like(flat)
        )
        ends = counts.cumsum(0)
        blocks = (counts + _BLOCK_T - 1) // _BLOCK_T
        block_ends = blocks.cumsum(0)
        b = torch.arange(triton.cdiv(slots, _BLOCK_T) + min(experts, slots), device=index.device)
        expert = torch.searchsorted(block_ends, b, right=True)
        e = expert.clamp(max=experts - 1)
        first = ends[e] - counts[e] + (b - (block_ends[e] - blocks[e])) * _BLOCK_T
        order = flat.argsort(stable=True)
        return _Blocks(*(x.int() for x in (order, expert, first, ends[e])))


def experts(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, index: torch.Tensor, weights: torch.Tensor,
    gate_up: torch.Tensor, down: torch.Tensor, sizes: list[int], out: torch.Tensor,
) -> None:  # fmt: skip
    """``out[t] += sum_j weights[t, j] * expert(norm(x[t]))``, packed experts; ``sizes`` as of the op."""
    inner, group, down_group, bits, asymmetric = sizes
    tokens, top_k = index.shape
    hidden, count = x.shape[1], gate_up.shape[0]
    first, second = (
        Tiles.of(n, k, bits, g, bool(asymmetric)) for n, k, g in ((2 * inner, hidden, group), (hidden, inner, down_group))
    )  # fmt: skip
    w1, w2 = words_of("gate_up", gate_up, first), words_of("down", down, second)
    options = [layout_options(tiles, bool(asymmetric), bits) for tiles in (first, second)]
    words = [tiles.count * (tiles.tile + tiles.low) for tiles in (first, second)]
    slots = tokens * top_k
    act = torch.empty(slots, inner, device=x.device)
    inputs = prepare(x, norm, eps, group, sums=bool(asymmetric))
    if slots <= MOST_SINGLE_SLOTS:
        _single_gate_up[(triton.cdiv(inner, 16), slots)](
            inputs.planes, inputs.sums, inputs.factor, index, w1, act, words[0], inner, inputs.planes.shape[2], TOP_K=top_k,
            **options[0], KB=64, ASM=DOT8, num_warps=4,
        )  # fmt: skip
        inputs = prepare(act, None, 0.0, down_group, sums=bool(asymmetric))
        _single_down[(triton.cdiv(hidden, 16), tokens)](
            inputs.planes, inputs.sums, inputs.factor, index, weights, w2, out, out.stride(0), words[1], hidden,
            inputs.planes.shape[2], TOP_K=top_k, **options[1], KB=64, ASM=DOT8, num_warps=4,
        )  # fmt: skip
        return
    blocks = _Blocks.of(index, count)
    table = [blocks.order, blocks.expert, blocks.first, blocks.last]
    shape = {"KB": 16, "BLOCK_T": _BLOCK_T, "TILES": _TILES, "num_warps": 4}
    _grouped[(len(blocks.expert), triton.cdiv(inner, 16 * _TILES))](
        inputs.planes, inputs.factor, *table, w1, act, words[0], inner, count, inputs.planes.shape[2], inner, top_k, True,
        **options[0], **shape,
    )  # fmt: skip
    inputs = prepare(act, None, 0.0, down_group, sums=bool(asymmetric))
    y = torch.empty(slots, hidden, device=x.device)
    _grouped[(len(blocks.expert), triton.cdiv(hidden, 16 * _TILES))](
        inputs.planes, inputs.factor, *table, w2, y, words[1], hidden, count, inputs.planes.shape[2], 0, 1, False,
        **options[1], **shape,
    )  # fmt: skip
    out += torch.einsum("tk,tkh->th", weights, y.view(tokens, top_k, hidden))


def _plain_experts(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """The same of experts ``[E, 2I, H]`` and ``[E, H, I]`` that are not packed: the chosen ones side by side, by cuBLAS."""
    chosen = index.flatten().long()
    rows = x.repeat_interleave(index.shape[1], 0).to(gate_up.dtype)
    parts = []
    for some, e in zip(rows.split(MOST_SINGLE_SLOTS), chosen.split(MOST_SINGLE_SLOTS), strict=True):
        gate, up = torch.bmm(gate_up[e], some[..., None])[..., 0].float().chunk(2, -1)
        parts.append(torch.bmm(down[e], (functional.silu(gate) * up).to(down.dtype)[..., None])[..., 0].float())
    return torch.einsum("tk,tkh->th", weights, torch.cat(parts).unflatten(0, tuple(index.shape)))


def run(
    h: torch.Tensor, norm: torch.Tensor, router: torch.Tensor, correction_bias: torch.Tensor | None,
    gate_up: torch.Tensor, down: torch.Tensor, shared_gate: torch.Tensor | None, shared_up: torch.Tensor | None,
    shared_down: torch.Tensor | None, eps: float, sizes: list[int], shared_sizes: list[int], choice: list[int],
    weighting: list[float],
) -> None:  # fmt: skip
    """Arguments as of the torch op."""
    if h.dim() != 2 or h.stride(1) != 1 or h.dtype != torch.float32 or router.shape[1] != h.shape[1]:
        raise InputError.argument("moe: h", expected=f"[T, {router.shape[1]}] float32", got=(h.dtype, tuple(h.shape)))
    if h.shape[0] == 0:
        return
    x = functional.rms_norm(h, (h.shape[1],), norm, eps)
    index, weights = route(x @ router.float().T, correction_bias, choice, weighting)
    # what goes through the shared experts is what came in: their part is added at the end
    shared = None
    if shared_gate is not None and shared_up is not None and shared_down is not None:
        shared = _shared(h, norm, eps, [shared_gate, shared_up, shared_down], shared_sizes)
    if gate_up.dtype == torch.uint8:
        experts(h, norm, eps, index, weights, gate_up, down, sizes, h)
    else:
        h += _plain_experts(x, index, weights, gate_up, down)
    if shared is not None:
        h += shared


def _shared(
    h: torch.Tensor, norm: torch.Tensor, eps: float, parts: list[torch.Tensor], sizes: list[int]
) -> torch.Tensor:  # fmt: skip
    inner, group, down_group, bits, asymmetric = sizes
    gate, up, down = parts
    kind = bits if gate.dtype == torch.uint8 else 8 * gate.element_size()
    act = torch.empty(h.shape[0], inner, device=h.device)
    fused_linear(
        h, norm, eps, [gate, up], [inner, inner], [kind] * 2, [asymmetric] * 2, group, None, SWIGLU, act
    )  # fmt: skip
    out = torch.empty(h.shape[0], h.shape[1], device=h.device)
    fused_linear(act, None, 0.0, [down], [h.shape[1]], [kind], [asymmetric], down_group, None, 0, out)
    return out
