"""Cases, tolerances and traffic of int4_experts."""

from __future__ import annotations

import torch

from llmopt.ops.int4_experts import int4_experts, reference
from llmopt.ops.int4_linear import layout
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    p = case.params
    g = torch.Generator().manual_seed(seed)
    e, h, i, k, tokens = p["experts"], p["hidden"], p["intermediate"], p["top_k"], p["tokens"]
    group, down_group = p.get("group", 128), p.get("down_group", 128)

    def weight(n: int, cols: int, size: int) -> torch.Tensor:
        q = torch.randint(0, 16, (e, n, cols), generator=g, dtype=torch.uint8)
        groups = -(-cols // size)
        scales = (torch.rand(e, n, groups, generator=g) + 0.1) * cols**-0.5 / 5
        zeros = torch.randint(6, 10, (e, n, groups), generator=g, dtype=torch.uint8) if p.get("asymmetric") else None
        return layout.pack(q, scales, zeros, group_size=size, bits=4)

    dtype = p.get("dtype", torch.float32)
    scores = torch.rand(tokens, e, generator=g)
    top = scores.topk(k, dim=-1)
    return {
        "x": torch.randn(tokens, h, generator=g).to(dtype),
        "index": top.indices,
        "weights": top.values / top.values.sum(-1, keepdim=True),
        "gate_up": weight(2 * i, h, group),
        "down": weight(h, i, down_group),
        "intermediate": i,
        "group_size": group,
        "down_group_size": down_group,
        "asymmetric": bool(p.get("asymmetric")),
    }


def bytes_moved(*, x: torch.Tensor, index: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, **_: object) -> int:
    hit: int = torch.unique(index).numel()
    return hit * (gate_up[0].numel() + down[0].numel()) + 2 * x.numel() * x.element_size()


def flops(*, x: torch.Tensor, index: torch.Tensor, intermediate: int, **_: object) -> int:
    return 6 * index.numel() * x.shape[1] * intermediate


SPEC = OpSpec(
    name="int4_experts",
    run=int4_experts,
    reference=reference.experts,
    make_inputs=make_inputs,
    cases=(
        Case("one_token", {"tokens": 1, "experts": 4, "top_k": 2, "hidden": 128, "intermediate": 64, "down_group": 64}),
        Case("no_tokens", {"tokens": 0, "experts": 4, "top_k": 2, "hidden": 128, "intermediate": 128}),
        Case(
            "top_1",
            {"tokens": 3, "experts": 2, "top_k": 1, "hidden": 64, "intermediate": 32, "group": 32, "down_group": 32},
        ),
        Case(
            "all_experts", {"tokens": 5, "experts": 3, "top_k": 3, "hidden": 128, "intermediate": 96, "down_group": 32}
        ),
        Case(
            "odd_sizes",
            {"tokens": 7, "experts": 5, "top_k": 2, "hidden": 72, "intermediate": 40, "group": 64, "down_group": 32},
        ),
        Case(
            "asymmetric",
            {"tokens": 33, "experts": 8, "top_k": 2, "hidden": 256, "intermediate": 128, "asymmetric": True},
        ),
        Case("many_tokens", {"tokens": 61, "experts": 4, "top_k": 2, "hidden": 128, "intermediate": 128}),
        Case(
            "deepseek_v2_lite_t1",
            {"tokens": 1, "experts": 64, "top_k": 6, "hidden": 2048, "intermediate": 1408, "dtype": torch.bfloat16},
            real=True,
        ),
    ),
    # a code of an expert's inner activations may fall on the other side of a tie
    tolerance={torch.float32: (1e-4, 5e-4), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (1e-3, 2e-3)},
    bytes_moved=bytes_moved,
    flops=flops,
)
