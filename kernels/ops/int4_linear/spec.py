"""Cases, tolerances and traffic of int4_linear."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmopt.ops import shapes
from llmopt.ops.int4_linear import int4_linear, layout, reference
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random codes and scales of a plausible size; activations normal with a few outliers."""
    p = case.params
    g = torch.Generator().manual_seed(seed)
    n, k, group = p["n"], p["k"], p.get("group", 128)
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = torch.rand(n, groups, generator=g) * 0.01 + 0.001
    zeros = torch.randint(0, 16, (n, groups), generator=g, dtype=torch.uint8) if p.get("asymmetric") else None
    x = torch.randn(p["tokens"], k, generator=g)
    x[:, :: max(k // 7, 1)] *= 8
    dtype = p.get("dtype", torch.float32)
    bias = torch.randn(n, generator=g).to(dtype) if p.get("bias") else None
    return {
        "x": x.to(dtype),
        "packed": layout.pack(q, scales, zeros, group_size=group, bits=4),
        "bias": bias,
        "out_features": n,
        "group_size": group,
        "asymmetric": zeros is not None,
    }


def bytes_moved(
    *, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, **_: object
) -> int:
    size = x.element_size()
    return packed.numel() + x.numel() * size + x.shape[0] * out_features * size


def flops(*, x: torch.Tensor, out_features: int, **_: object) -> int:
    return 2 * x.shape[0] * x.shape[1] * out_features


def _bf16(x: torch.Tensor, *, out_features: int, **_: object) -> Callable[[], torch.Tensor]:
    """What the op replaces: a bf16 linear of the same shape. The weight is made here, outside the timed call."""
    weight = torch.randn(out_features, x.shape[1], dtype=torch.bfloat16)
    activations = x.bfloat16()
    return lambda: torch.nn.functional.linear(activations, weight)


_ODD = (
    Case("one_row", {"tokens": 1, "n": 16, "k": 128}),
    Case("no_tokens", {"tokens": 0, "n": 16, "k": 128}),
    Case("tail_rows", {"tokens": 3, "n": 37, "k": 256, "group": 64, "bias": True}),
    Case("tail_group", {"tokens": 5, "n": 48, "k": 200, "group": 128}),
    Case("short_k", {"tokens": 2, "n": 20, "k": 24, "group": 32, "asymmetric": True}),
    Case("odd_k", {"tokens": 4, "n": 33, "k": 63, "group": 64, "asymmetric": True, "bias": True}),
    Case("asymmetric", {"tokens": 1, "n": 64, "k": 512, "group": 128, "asymmetric": True, "bias": True}),
    Case("asymmetric_many", {"tokens": 29, "n": 80, "k": 320, "group": 32, "asymmetric": True}),
    *(
        Case(f"tokens_{t}", {"tokens": t, "n": 96, "k": 384, "group": 128})
        for t in (2, 3, 7, 8, 11, 12, 13, 23, 24, 25, 63, 261)
    ),
    *(Case(f"group_{g}", {"tokens": 1, "n": 48, "k": 768, "group": g}) for g in (32, 64, 128)),
)
_REAL = (
    *(
        Case(f"qwen3_0.6b_{name}_t{t}", {"tokens": t, "n": n, "k": k, "dtype": torch.bfloat16}, real=True)
        for name, (n, k) in shapes.QWEN3_0_6B.items()
        for t in (1, 8, 512)
    ),
    Case("deepseek_v2_lite_dense_down_t1", {"tokens": 1, "n": 2048, "k": 10944, "dtype": torch.bfloat16}, real=True),
    Case("head_qwen3_0.6b_t1", {"tokens": 1, "n": 151936, "k": 1024, "dtype": torch.bfloat16}, real=True),
)

SPEC = OpSpec(
    name="int4_linear",
    run=int4_linear,
    reference=reference.linear,
    make_inputs=make_inputs,
    cases=_ODD + _REAL,
    tolerance={torch.float32: (1e-5, 1e-4), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (1e-3, 2e-3)},
    bytes_moved=bytes_moved,
    flops=flops,
    rivals={"bf16_linear": _bf16},
)
