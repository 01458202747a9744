"""Cases, tolerances and traffic of rope_cache."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.ops.rope_cache import reference, rope_cache
from llmopt.ops.spec import Case, Inputs, OpSpec

# heads of q and of k and v, head size, norms on the heads of q and k, pairs turned side by side
QWEN3_0_6B = {"heads": 16, "kv_heads": 8, "dim": 128, "norm": "qk"}
QWEN3_8B = {"heads": 32, "kv_heads": 8, "dim": 128, "norm": "qk"}
ERNIE_4_5_0_3B = {"heads": 16, "kv_heads": 2, "dim": 128, "interleaved": True}


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, heads, kv_heads, dim, rotary, sequences, capacity; norm ("q", "k", "qk"), interleaved, dtype.

    The tokens lie in any order over the sequences, each in a slot of its own, at a position that is not its slot.
    """
    p = {
        "sequences": 1,
        "capacity": max(case.params["tokens"], 1) + 3,
        "dtype": torch.float32,
        "norm": "",
        **case.params,
    }
    g = torch.Generator().manual_seed(seed)
    tokens, dim, capacity = p["tokens"], p["dim"], p["capacity"]
    place = torch.randperm(p["sequences"] * capacity, generator=g)[:tokens].to(torch.int32)
    angle = torch.rand(2 * capacity, p.get("rotary", dim) // 2, generator=g) * 6.3

    def norm(name: str) -> torch.Tensor | None:
        return torch.rand(dim, generator=g) + 0.5 if name in p["norm"] else None

    return {
        # keys and values as they are before
        "cache": torch.randn(2, p["sequences"], p["kv_heads"], capacity, dim, generator=g).to(p["dtype"]),
        "qkv": torch.randn(tokens, (p["heads"] + 2 * p["kv_heads"]) * dim, generator=g),
        "q_norm": norm("q"),
        "k_norm": norm("k"),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "position": torch.randint(0, 2 * capacity, (tokens,), generator=g, dtype=torch.int32),
        "seq": (place // capacity).to(torch.int32),
        "slot": (place % capacity).to(torch.int32),
        "interleaved": bool(p.get("interleaved")),
        "eps": 1e-6,
    }


def _outputs(cache: torch.Tensor, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(all, q, k, v)``: one flat tensor, and the op's outputs as views of it; k and v hold the cache's contents."""
    _, _, kv_heads, _, dim = cache.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    flat = torch.empty(qkv.shape[0] * heads * dim + cache.numel(), dtype=cache.dtype, device=cache.device)
    q, kv = flat[: -cache.numel()].view(-1, heads, dim), flat[-cache.numel() :].view(cache.shape)
    kv.copy_(cache)
    return flat, q, kv[0], kv[1]


def run(cache: torch.Tensor, qkv: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, **rest: Any) -> torch.Tensor:
    """The op with outputs of its own, returned as one flat tensor: q, keys, values.

    Args:
        cache: ``[2, S, Hk, C, D]``, keys and values before.
        qkv, cos, sin, rest: see :func:`rope_cache`.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: a position, sequence or slot is out of range.
    """
    flat, q, k, v = _outputs(cache, qkv)
    rope_cache(qkv, q, k, v, cos=cos.contiguous(), sin=sin.contiguous(), **rest)
    return flat


def run_reference(cache: torch.Tensor, qkv: torch.Tensor, **rest: Any) -> torch.Tensor:
    flat, q, k, v = _outputs(cache, qkv)
    reference.rope_cache(qkv, q, k, v, **rest)
    return flat


def torch_arguments(cache: torch.Tensor, qkv: torch.Tensor, **rest: Any) -> Inputs:
    _, q, k, v = _outputs(cache, qkv)
    return {**rest, "qkv": qkv, "q": q.clone(), "k": k.clone(), "v": v.clone()}


def bytes_moved(*, cache: torch.Tensor, qkv: torch.Tensor, **_: object) -> int:
    """Each head read and written once; the cache beyond the new slots is not touched."""
    return qkv.numel() * (qkv.element_size() + cache.element_size())


def flops(*, cache: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, **_: object) -> int:
    """Six for each pair that is turned; the norms come on top."""
    heads = qkv.shape[1] // cache.shape[4] - cache.shape[2]
    return 6 * qkv.shape[0] * heads * cos.shape[1]


def _real(name: str, shape: dict[str, Any], *tokens: int) -> list[Case]:
    return [Case(f"{name}_t{t}", {**shape, "tokens": t, "dtype": torch.bfloat16}, real=True) for t in tokens]


_SMALL = {"heads": 4, "kv_heads": 2, "dim": 32}
SPEC = OpSpec(
    name="rope_cache",
    run=run,
    reference=run_reference,
    make_inputs=make_inputs,
    cases=(
        Case("one_head", {"tokens": 1, "heads": 1, "kv_heads": 1, "dim": 16}),
        Case("no_tokens", {**_SMALL, "tokens": 0}),
        *(Case(f"tokens_{t}", {**_SMALL, "tokens": t, "norm": "qk", "sequences": 2}) for t in (1, 2, 3, 8, 9, 17, 63)),
        *(Case(f"interleaved_{t}", {**_SMALL, "tokens": t, "interleaved": True, "sequences": 3}) for t in (1, 3, 17)),
        *(Case(f"norm_{name}", {**_SMALL, "tokens": 5, "norm": name}) for name in ("q", "k")),
        *(
            Case(f"head_size_{d}", {"tokens": 3, "heads": 3, "kv_heads": 1, "dim": d, "norm": "qk"})
            for d in (2, 20, 30, 64, 80, 96, 128, 192, 256, 512)
        ),
        *(
            Case(
                f"rotary_{r}_of_{d}{'_interleaved' * i}",
                {**_SMALL, "tokens": 3, "dim": d, "rotary": r, "interleaved": i},
            )
            for r, d in ((2, 32), (16, 64), (30, 80), (64, 192))
            for i in (False, True)
        ),
        *(
            Case(f"heads_{h}_{n}", {"tokens": 4, "heads": h, "kv_heads": n, "dim": 16})
            for h, n in ((8, 1), (3, 3), (10, 5))
        ),
        Case("full_cache", {**_SMALL, "tokens": 33, "sequences": 3, "capacity": 11, "norm": "qk"}),
        *_real("qwen3_0.6b", QWEN3_0_6B, 1, 8, 512),
        *_real("qwen3_8b", QWEN3_8B, 1, 8),
        *_real("ernie_4.5_0.3b", ERNIE_4_5_0_3B, 1, 8),
    ),
    tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 1e-3), torch.float16: (1e-3, 1e-4)},
    bytes_moved=bytes_moved,
    flops=flops,
    torch_arguments=torch_arguments,
)
