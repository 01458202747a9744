"""Cases, tolerances and traffic of screened_head."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmopt.ops import shapes
from llmopt.ops.fused_linear import Weight, fused_linear
from llmopt.ops.fused_linear.spec import tokens_of, weight_data
from llmopt.ops.int4_linear import layout
from llmopt.ops.next_token import next_token
from llmopt.ops.screened_head import MARGIN, reference, screened_head
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, n, k, group, norm."""
    p = case.params
    g = torch.Generator().manual_seed(seed)
    k, group = p["k"], p.get("group", 128)
    return {
        "x": tokens_of(p["tokens"], k, g).to(p.get("dtype", torch.float32)),
        "norm": torch.rand(k, generator=g) + 0.5 if p.get("norm") else None,
        "packed": weight_data("int8", p["n"], k, group, g),
        "rows": p["n"],
        "group_size": group,
        "eps": 1e-6,
    }


def _weight(x: torch.Tensor, packed: torch.Tensor, rows: int, group_size: int) -> Weight:
    return Weight(packed.contiguous(), rows, x.shape[1], 8, group_size)


def run(
    x: torch.Tensor, norm: torch.Tensor | None, packed: torch.Tensor, *, rows: int, group_size: int, eps: float
) -> torch.Tensor:
    """The op with an output of its own.

    Args:
        x, norm, eps: see :func:`screened_head`.
        packed, rows, group_size: of the weight.

    Raises:
        InputError: shapes or dtypes do not fit together.
    """
    ids = torch.empty(x.shape[0], dtype=torch.int64)
    screened_head(x, _weight(x, packed, rows, group_size), ids, norm=norm, eps=eps)
    return ids


def run_reference(
    x: torch.Tensor, norm: torch.Tensor | None, packed: torch.Tensor, *, rows: int, group_size: int, eps: float
) -> torch.Tensor:
    return reference.screened_head(x, _weight(x, packed, rows, group_size), norm=norm, eps=eps)


def torch_arguments(*, x: torch.Tensor, **rest: object) -> Inputs:
    return {**rest, "x": x, "margin": MARGIN, "ids": torch.empty(x.shape[0], dtype=torch.int64), "scored": None}


def bytes_moved(*, x: torch.Tensor, packed: torch.Tensor, group_size: int, **_: object) -> int:
    """Scales and the first plane of all rows, tokens and ids; the few rows scored exactly aside."""
    tiles, size = packed.shape
    plane = layout.plane_bytes(x.shape[1], group_size)
    return tiles * (size - plane) + x.numel() * x.element_size() + 8 * x.shape[0]


def flops(*, x: torch.Tensor, rows: int, **_: object) -> int:
    return 2 * x.shape[0] * x.shape[1] * rows


def _all_rows(
    x: torch.Tensor, norm: torch.Tensor | None, packed: torch.Tensor, *, rows: int, group_size: int, eps: float
) -> Callable[[], None]:
    """What the op stands in for: all logits at 8 bits, and their argmax."""
    logits, ids = torch.empty(x.shape[0], rows), torch.empty(x.shape[0], dtype=torch.int64)
    weight = _weight(x, packed, rows, group_size)

    def call() -> None:
        fused_linear(x, (weight,), logits, norm=norm, eps=eps)
        next_token(logits, ids)

    return call


_HEADS = {"qwen3_0.6b": shapes.HEAD_QWEN3_0_6B, "ernie_4.5_0.3b": (103424, 1024), "deepseek_v2_lite": (102400, 2048)}
SPEC = OpSpec(
    name="screened_head",
    run=run,
    reference=run_reference,
    make_inputs=make_inputs,
    cases=(
        Case("one_row", {"tokens": 1, "n": 1, "k": 32, "group": 32}),
        Case("no_tokens", {"tokens": 0, "n": 16, "k": 32, "group": 32}),
        *(Case(f"tokens_{t}", {"tokens": t, "n": 1000, "k": 200, "norm": True}) for t in (1, 2, 3, 8, 9, 17, 63)),
        *(Case(f"rows_{n}", {"tokens": 2, "n": n, "k": 256}) for n in (15, 16, 17, 255, 257, 5003)),
        *(
            Case(f"group_{v}_t{t}", {"tokens": t, "n": 700, "k": 264, "group": v})
            for t, v in ((1, 32), (3, 64), (30, 32))
        ),
        Case("short_k", {"tokens": 2, "n": 300, "k": 5, "group": 32, "norm": True}),
        *(
            Case(f"{name}_t{t}", {"tokens": t, "n": n, "k": k, "norm": True}, real=True)
            for name, (n, k) in _HEADS.items()
            for t in ((1, 8) if n > 150_000 else (1,))
        ),
    ),
    # whole numbers, of one right value
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (0.0, 0.0)),
    bytes_moved=bytes_moved,
    flops=flops,
    torch_arguments=torch_arguments,
    rivals={"all_rows": _all_rows},
)
