"""Cases, tolerances and traffic of embed."""

from __future__ import annotations

import torch

from llmopt.ops import shapes
from llmopt.ops.embed import embed, reference
from llmopt.ops.fused_linear import Weight
from llmopt.ops.fused_linear.spec import bits_of, weight_data
from llmopt.ops.spec import Case, Inputs, OpSpec

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, n, k; packed ("int4" or "int8") and group, or dtype of a plain table."""
    p = case.params
    g = torch.Generator().manual_seed(seed)
    n, k, group = p["n"], p["k"], p.get("group", 128)
    kind = p.get("packed") or _KINDS[p.get("dtype", torch.float32)]
    ids = torch.randint(0, n, (p["tokens"],), generator=g)
    ids[:2] = torch.tensor([n - 1, 0])[: p["tokens"]]
    return {
        "ids": ids,
        "table": weight_data(kind, n, k, group, g),
        "rows": n,
        "cols": k,
        "bits": bits_of(kind),
        "group_size": group,
    }


def run(ids: torch.Tensor, table: torch.Tensor, *, rows: int, cols: int, bits: int, group_size: int) -> torch.Tensor:
    """The op with an output of its own.

    Args:
        ids: see :func:`embed`.
        table: packed or plain, with rows, cols, bits and group_size as of :class:`llmopt.ops.fused_linear.Weight`.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: an id is out of range.
    """
    out = torch.empty(ids.shape[0], cols, device=ids.device)
    embed(ids, Weight(table.contiguous(), rows, cols, bits, group_size), out)
    return out


def run_reference(
    ids: torch.Tensor, table: torch.Tensor, *, rows: int, cols: int, bits: int, group_size: int
) -> torch.Tensor:
    return reference.embed(ids, Weight(table, rows, cols, bits, group_size))


def torch_arguments(*, ids: torch.Tensor, cols: int, **rest: object) -> Inputs:
    return {**rest, "ids": ids, "out": torch.empty(ids.shape[0], cols, device=ids.device)}


def bytes_moved(*, ids: torch.Tensor, table: torch.Tensor, rows: int, cols: int, bits: int, **_: object) -> int:
    """The rows that are looked up (scales aside), and the output."""
    return ids.numel() * (8 + cols * bits // 8 + 4 * cols)


def flops(*, ids: torch.Tensor, cols: int, **_: object) -> int:
    """One a value: its scale, or its conversion."""
    return ids.numel() * cols


_F32 = (torch.float32,)  # a packed table has no other dtype
_HEAD_N, _HEAD_K = shapes.HEAD_QWEN3_0_6B
SPEC = OpSpec(
    name="embed",
    run=run,
    reference=run_reference,
    make_inputs=make_inputs,
    cases=(
        Case("one_token", {"tokens": 1, "n": 16, "k": 32}),
        Case("no_tokens", {"tokens": 0, "n": 16, "k": 32}),
        *(Case(f"tokens_{t}", {"tokens": t, "n": 50, "k": 77}) for t in (2, 3, 8, 9, 17, 63)),
        Case("one_entry", {"tokens": 3, "n": 1, "k": 1}),
        Case("many_bytes", {"tokens": 300, "n": 40, "k": 512}),
        *(
            Case(
                f"{kind}_group_{group}",
                {"tokens": t, "n": 37, "k": 200, "packed": kind, "group": group, "dtypes": _F32},
            )
            for kind in ("int4", "int8")
            for t, group in ((1, 32), (9, 64), (63, 128))
        ),
        Case("int4_short", {"tokens": 2, "n": 3, "k": 5, "packed": "int4", "group": 32, "dtypes": _F32}),
        Case("int8_none", {"tokens": 0, "n": 16, "k": 64, "packed": "int8", "dtypes": _F32}),
        *(
            Case(
                f"qwen3_0.6b_int8_t{t}",
                {"tokens": t, "n": _HEAD_N, "k": _HEAD_K, "packed": "int8", "dtypes": _F32},
                real=True,
            )
            for t in (1, 8)
        ),
        Case("qwen3_0.6b_bf16_t1", {"tokens": 1, "n": _HEAD_N, "k": _HEAD_K, "dtype": torch.bfloat16}, real=True),
    ),
    # a conversion is exact, and so is one product
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (0.0, 0.0)),
    bytes_moved=bytes_moved,
    flops=flops,
    torch_arguments=torch_arguments,
)
