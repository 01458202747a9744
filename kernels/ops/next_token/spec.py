"""Cases, tolerances and traffic of next_token."""

from __future__ import annotations

import torch

from llmopt.ops import shapes
from llmopt.ops.next_token import next_token, reference
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, vocab; ties: whole numbers, so that the largest stands in many places."""
    p = case.params
    logits = torch.randn(p["tokens"], p["vocab"], generator=torch.Generator().manual_seed(seed)) * 4
    return {"logits": logits.round() if p.get("ties") else logits}


def run(logits: torch.Tensor) -> torch.Tensor:
    """The op with an output of its own.

    Args:
        logits: see :func:`next_token`.

    Raises:
        InputError: shapes or dtypes do not fit together.
    """
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    next_token(logits, ids)
    return ids


def torch_arguments(logits: torch.Tensor) -> Inputs:
    return {"logits": logits, "ids": torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)}


def bytes_moved(logits: torch.Tensor) -> int:
    return logits.numel() * 4 + logits.shape[0] * 8


def flops(logits: torch.Tensor) -> int:
    """One comparison a value."""
    return logits.numel()


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


_VOCAB = shapes.HEAD_QWEN3_0_6B[0]
SPEC = OpSpec(
    name="next_token",
    run=run,
    reference=reference.next_token,
    make_inputs=make_inputs,
    cases=(
        Case("one_value", {"tokens": 1, "vocab": 1}),
        Case("no_tokens", {"tokens": 0, "vocab": 10}),
        *(Case(f"tokens_{t}", {"tokens": t, "vocab": 77}) for t in (2, 3, 8, 9, 17, 63)),
        *(Case(f"vocab_{v}", {"tokens": 2, "vocab": v}) for v in (2, 15, 16, 17, 511, 512, 513, 1030, 5000)),
        *(Case(f"ties_{v}", {"tokens": 3, "vocab": v, "ties": True}) for v in (40, 700, 70000)),
        Case("three_shares", {"tokens": 3, "vocab": 140001}),
        Case("qwen3_t1", {"tokens": 1, "vocab": _VOCAB}, real=True),
        Case("qwen3_t8", {"tokens": 8, "vocab": _VOCAB}, real=True),
        Case("ernie_4.5_t1", {"tokens": 1, "vocab": 103424}, real=True),
    ),
    tolerance={torch.float32: (0.0, 0.0)},
    bytes_moved=bytes_moved,
    flops=flops,
    torch_arguments=torch_arguments,
    rivals={"argmax": _argmax},
)
