"""Cases, tolerances and traffic of int8_linear."""

from __future__ import annotations

import torch

from llmopt.ops import shapes
from llmopt.ops.int4_linear import layout
from llmopt.ops.int4_linear.spec import bytes_moved, flops
from llmopt.ops.int8_linear import int8_linear, reference
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    p = case.params
    g = torch.Generator().manual_seed(seed)
    n, k, group, dtype = p["n"], p["k"], p.get("group", 128), p.get("dtype", torch.float32)
    q = torch.randint(1, 256, (n, k), generator=g, dtype=torch.uint8)
    scales = torch.rand(n, -(-k // group), generator=g) * 6e-4 + 6e-5
    return {
        "x": torch.randn(p["tokens"], k, generator=g).to(dtype),
        "packed": layout.pack(q, scales, None, group_size=group, bits=8),
        "bias": torch.randn(n, generator=g).to(dtype) if p.get("bias") else None,
        "out_features": n,
        "group_size": group,
    }


_HEAD_N, _HEAD_K = shapes.HEAD_QWEN3_0_6B
SPEC = OpSpec(
    name="int8_linear",
    run=int8_linear,
    reference=reference.linear,
    make_inputs=make_inputs,
    cases=(
        Case("one_row", {"tokens": 1, "n": 16, "k": 128}),
        Case("no_tokens", {"tokens": 0, "n": 16, "k": 64, "group": 64}),
        Case("tails", {"tokens": 3, "n": 37, "k": 200, "group": 64, "bias": True}),
        *(Case(f"tokens_{t}", {"tokens": t, "n": 96, "k": 384}) for t in (2, 5, 12, 25)),
        *(Case(f"group_{v}", {"tokens": 1, "n": 48, "k": 768, "group": v}) for v in (32, 64)),
        Case("head_qwen3_0.6b_t1", {"tokens": 1, "n": _HEAD_N, "k": _HEAD_K, "dtype": torch.bfloat16}, real=True),
    ),
    tolerance={torch.float32: (1e-5, 1e-4), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (1e-3, 2e-3)},
    bytes_moved=bytes_moved,
    flops=flops,
)
