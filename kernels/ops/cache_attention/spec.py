"""Cases, tolerances, traffic and rivals of cache_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmopt.ops.cache_attention import cache_attention, reference
from llmopt.ops.rope_cache.reference import quantize
from llmopt.ops.spec import Case, Inputs, OpSpec

# heads of q and of k and v, head size
QWEN3_0_6B = {"heads": 16, "kv_heads": 8, "dim": 128}
QWEN3_8B = {"heads": 32, "kv_heads": 8, "dim": 128}
ERNIE_4_5_0_3B = {"heads": 16, "kv_heads": 2, "dim": 128}


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: chunks (``(sequence, first slot, tokens)`` each, in the order of the rows), heads, kv_heads, dim, dtype.

    capacity and sequences: what the chunks need unless given; start: first slot of each sequence, or None; int8: of the
    cache, whose scales differ from token to token.
    """
    p = {"dtype": torch.float32, "start": None, "spare": 2, "int8": False, **case.params}
    g = torch.Generator().manual_seed(seed)
    sequences = p.get("sequences", 1 + max((s for s, _, _ in p["chunks"]), default=0))
    capacity = p["spare"] + max((first + count for _, first, count in p["chunks"]), default=1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(p["dtype"])

    def row(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    shape = (sequences, p["kv_heads"], capacity, p["dim"])
    q = normal(sum(count for _, _, count in p["chunks"]), p["heads"], p["dim"])
    cache = {"k": normal(*shape), "v": normal(*shape)}
    if p["int8"]:
        for name in ("k", "v"):
            spread = 2.0 ** torch.randint(-3, 1, shape[:3], generator=g)
            cache[name], cache[f"{name}_scale"] = quantize(cache[name].float() * spread[..., None])
    return {
        "q": q,
        **cache,
        "seq": row([s for s, _, count in p["chunks"] for _ in range(count)]),
        "slot": row([first + i for _, first, count in p["chunks"] for i in range(count)]),
        "start": None if p["start"] is None else row(p["start"]),
        "scale": p["dim"] ** -0.5,
    }


def _new_out(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
    """The op with an output of its own, of tensors that need not be contiguous.

    Args:
        q, k, v, rest: see :func:`cache_attention`.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: a sequence or slot is out of range.
    """
    out = _new_out(q)
    scales = {name: rest.pop(name).contiguous() for name in ("k_scale", "v_scale") if rest.get(name) is not None}
    cache_attention(q.contiguous(), k.contiguous(), v.contiguous(), out, **scales, **rest)
    return out


def torch_arguments(**inputs: Any) -> Inputs:
    return {**inputs, "out": _new_out(inputs["q"])}


def _pairs(seq: torch.Tensor, slot: torch.Tensor, start: torch.Tensor | None) -> int:
    first = 0 if start is None else int(start[seq.long()].sum())
    return int(slot.sum()) + len(slot) - first


def bytes_moved(
    q: torch.Tensor, k: torch.Tensor, *, seq: torch.Tensor, slot: torch.Tensor, start: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None, **_: Any,
) -> int:  # fmt: skip
    """Keys and values of each sequence once, up to its last row's slot, with their scales; q and the output."""
    keys = 0
    for s in torch.unique(seq).tolist():
        keys += int(slot[seq == s].max()) + 1 - (0 if start is None else int(start[s]))
    row = k.shape[3] * k.element_size() + (0 if k_scale is None else k_scale.element_size())
    return 2 * keys * k.shape[1] * row + 2 * q.numel() * q.element_size()


def flops(
    q: torch.Tensor, *, seq: torch.Tensor, slot: torch.Tensor, start: torch.Tensor | None = None, **_: Any
) -> int:
    """Both products, for the pairs of query and key that are seen."""
    return 4 * q.shape[1] * q.shape[2] * _pairs(seq, slot, start)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, seq: torch.Tensor, slot: torch.Tensor, scale: float,
    k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None, **_: Any,
) -> Callable[[], torch.Tensor]:  # fmt: skip
    """torch's scaled_dot_product_attention, one call a sequence; real cases have one chunk of each. An int8 cache is turned
    into q's dtype beforehand."""
    calls = []
    if k_scale is not None and v_scale is not None:
        k, v = ((x * scales[..., None]).to(q.dtype) for x, scales in ((k, k_scale), (v, v_scale)))
    for s in torch.unique(seq).tolist():
        own = slot[seq == s]
        keys, values = (x[s, :, : int(own[-1]) + 1][None] for x in (k, v))
        calls.append((q[seq == s].transpose(0, 1)[None], keys, values, torch.arange(keys.shape[2]) <= own[:, None]))

    def run() -> torch.Tensor:
        parts = [
            torch.nn.functional.scaled_dot_product_attention(*call, scale=scale, enable_gqa=True) for call in calls
        ]
        return torch.cat(parts, dim=2)

    return run


def _case(name: str, shape: dict[str, int], *chunks: tuple[int, int, int], real: bool = False, **more: Any) -> Case:
    return Case(name, {"tokens": sum(c for _, _, c in chunks), "chunks": chunks, **shape, **more}, real)


def _int8(name: str, shape: dict[str, int], *chunks: tuple[int, int, int], **more: Any) -> Case:
    return _case(f"int8_{name}", shape, *chunks, dtype=torch.bfloat16, **_INT8, **more)


def _real(name: str, shape: dict[str, int], *chunks: tuple[int, int], **more: Any) -> list[Case]:
    """Cases ``(tokens, keys)``: the tokens are the last of the keys."""
    return [
        _case(f"{name}_q{tq}_k{tk}", shape, (0, tk - tq, tq), real=True, dtype=torch.bfloat16, spare=0, **more)
        for tq, tk in chunks
    ]


_INT8: dict[str, Any] = {"int8": True, "dtypes": (torch.bfloat16,)}
_SMALL = {"heads": 4, "kv_heads": 2, "dim": 32}
SPEC = OpSpec(
    name="cache_attention",
    run=run,
    reference=reference.cache_attention,
    make_inputs=make_inputs,
    cases=(
        _case("one_key", {"heads": 1, "kv_heads": 1, "dim": 16}, (0, 0, 1), spare=0),
        _case("no_tokens", _SMALL),
        *(_case(f"prompt_{t}", _SMALL, (0, 0, t)) for t in (2, 3, 8, 9, 17, 63)),
        *(_case(f"decode_{t}", _SMALL, (0, t, 1)) for t in (1, 15, 64, 700, 1100)),
        *(_case(f"chunk_{t}", _SMALL, (0, 40, t)) for t in (2, 9, 63)),
        *(_case(f"group_{n}", {"heads": 2 * n, "kv_heads": 2, "dim": 64}, (0, 30, 1), (1, 3, 5)) for n in range(1, 9)),
        *(_case(f"head_size_{d}", {**_SMALL, "dim": d}, (0, 20, 7), (1, 33, 1)) for d in (1, 20, 60, 80, 128, 192)),
        _case("ragged", _SMALL, (0, 5, 1), (1, 300, 1), (2, 0, 1), (3, 77, 1), (4, 600, 1)),
        _case("any_order", _SMALL, (2, 5, 3), (0, 9, 1), (2, 8, 2), (1, 0, 4), (0, 11, 2)),
        _case("a_sequence_without_rows", _SMALL, (0, 5, 3), (2, 4, 3), sequences=4),
        _case("prompts", _SMALL, (0, 0, 17), (1, 0, 9), (2, 0, 40)),
        _case("prompt_beside_decode", _SMALL, (0, 0, 63), (1, 500, 1), (2, 20, 8), (3, 90, 1)),
        # long enough for the loops in bfloat16, where there are any
        _case("long_runs", _SMALL, (0, 5, 70), (1, 300, 1), (2, 20, 33), (3, 600, 16), dtype=torch.bfloat16),
        _case("left_padding", _SMALL, (0, 6, 9), (1, 0, 15), (2, 14, 1), start=[6, 0, 14]),
        _case("left_padding_decode", _SMALL, (0, 40, 1), (1, 40, 1), (2, 700, 1), start=[13, 0, 40]),
        _int8("one_key", {"heads": 1, "kv_heads": 1, "dim": 16}, (0, 0, 1), spare=0),
        _int8("no_tokens", _SMALL),
        *(_int8(f"prompt_{t}", _SMALL, (0, 0, t)) for t in (2, 9, 17, 63)),
        *(_int8(f"decode_{t}", _SMALL, (0, t, 1)) for t in (1, 15, 64, 1100)),
        *(_int8(f"group_{n}", {"heads": 2 * n, "kv_heads": 2, "dim": 64}, (0, 30, 1), (1, 3, 5)) for n in range(1, 9)),
        *(_int8(f"head_size_{d}", {**_SMALL, "dim": d}, (0, 20, 7), (1, 33, 1)) for d in (1, 20, 60, 80, 128, 192)),
        _int8("any_order", _SMALL, (2, 5, 3), (0, 9, 1), (2, 8, 2), (1, 0, 4), (0, 11, 2)),
        _int8("long_runs", _SMALL, (0, 5, 70), (1, 300, 1), (2, 20, 33), (3, 600, 16)),
        _int8("left_padding", _SMALL, (0, 6, 9), (1, 0, 40), (2, 14, 1), start=[6, 0, 14]),
        _int8("left_padding_decode", _SMALL, (0, 40, 1), (1, 40, 1), (2, 700, 1), start=[13, 0, 40]),
        *_real("int8_qwen3_0.6b", QWEN3_0_6B, (1, 4096), (128, 1024), **_INT8),
        *_real("qwen3_0.6b", QWEN3_0_6B, (1, 128), (1, 4096), (128, 128), (128, 1024), (1024, 1024)),
        *_real("qwen3_8b", QWEN3_8B, (1, 4096), (128, 128)),
        *_real("ernie_4.5_0.3b", ERNIE_4_5_0_3B, (1, 4096), (128, 128)),
        _case(
            "qwen3_0.6b_batch_8", QWEN3_0_6B, *((s, 100 + 50 * s, 1) for s in range(8)), real=True, dtype=torch.bfloat16
        ),
    ),
    tolerance={torch.float32: (1e-5, 2e-5), torch.bfloat16: (1.6e-2, 4e-3), torch.float16: (2e-3, 1e-3)},
    bytes_moved=bytes_moved,
    flops=flops,
    torch_arguments=torch_arguments,
    rivals={"sdpa": sdpa},
)
