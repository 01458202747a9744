"""Cases, tolerances and traffic of latent_attention."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.ops.latent_attention import latent_attention, reference
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: runs of (sequence, first slot, tokens), heads, rank, rope, dtype."""
    p = {"dtype": torch.float32, **case.params}
    g = torch.Generator().manual_seed(seed)
    rows = [(s, first + i) for s, first, count in p["runs"] for i in range(count)]
    sequences = 1 + max((s for s, _ in rows), default=0)
    capacity = 2 + max((slot for _, slot in rows), default=0)
    dim = p["rank"] + p["rope"]
    return {
        "query": torch.randn(len(rows), p["heads"], dim, generator=g).to(p["dtype"]),
        "cache": torch.randn(sequences, capacity, dim, generator=g).to(p["dtype"]),
        "seq": torch.tensor([s for s, _ in rows], dtype=torch.int32),
        "slot": torch.tensor([slot for _, slot in rows], dtype=torch.int32),
        "scale": dim**-0.5,
        "rank": p["rank"],
    }


def run(query: torch.Tensor, cache: torch.Tensor, **rest: Any) -> torch.Tensor:
    """The op itself takes no copies."""
    return latent_attention(query.contiguous(), cache.contiguous(), **rest)


def _keys_seen(slot: torch.Tensor) -> int:
    return int((slot + 1).sum())


def bytes_moved(*, query: torch.Tensor, cache: torch.Tensor, slot: torch.Tensor, rank: int, **_: object) -> int:
    """Each key once per token: tokens of one sequence share them, which is not counted."""
    keys = _keys_seen(slot) * cache.shape[2] * cache.element_size()
    return keys + query.numel() * query.element_size() + query.shape[0] * query.shape[1] * rank * 4


def flops(*, query: torch.Tensor, cache: torch.Tensor, slot: torch.Tensor, rank: int, **_: object) -> int:
    return 2 * query.shape[1] * _keys_seen(slot) * (cache.shape[2] + rank)


_SMALL = {"heads": 4, "rank": 64, "rope": 16}
_LITE = {"heads": 16, "rank": 512, "rope": 64, "dtype": torch.bfloat16}
SPEC = OpSpec(
    name="latent_attention",
    run=run,
    reference=reference.latent_attention,
    make_inputs=make_inputs,
    cases=(
        Case("one_key", {**_SMALL, "runs": [(0, 0, 1)]}),
        Case("no_tokens", {**_SMALL, "runs": []}),
        *(Case(f"depth_{t}", {**_SMALL, "runs": [(0, t - 1, 1)]}) for t in (2, 23, 48, 49, 127, 128, 1500)),
        *(Case(f"heads_{h}", {**_SMALL, "heads": h, "runs": [(0, 200, 1)]}) for h in (1, 16, 20, 128)),
        Case("rank_37", {"heads": 4, "rank": 37, "rope": 6, "runs": [(0, 150, 2)]}),
        Case("rank_48_rope_32", {"heads": 17, "rank": 48, "rope": 32, "runs": [(0, 60, 1)]}),
        Case("a_few_tokens", {**_SMALL, "runs": [(0, 130, 8)]}),
        Case("from_the_start", {**_SMALL, "heads": 16, "runs": [(0, 0, 60)]}),
        Case("ragged", {**_SMALL, "runs": [(2, 70, 1), (0, 300, 3), (1, 0, 1), (0, 10, 2)]}),
        *(Case(f"deepseek_v2_lite_k{k}", {**_LITE, "runs": [(0, k - 1, 1)]}, real=True) for k in (128, 4096, 8192)),
        Case("deepseek_v3_k4096", {**_LITE, "heads": 128, "runs": [(0, 4095, 1)]}, real=True),
    ),
    # the result is float32 whatever the inputs are; with products of bfloat16 the weights are rounded
    tolerance={torch.float32: (1e-5, 2e-5), torch.bfloat16: (1.6e-2, 4e-3), torch.float16: (1e-5, 2e-5)},
    bytes_moved=bytes_moved,
    flops=flops,
)
