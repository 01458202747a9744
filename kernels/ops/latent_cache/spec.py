"""Cases, tolerances and traffic of latent_cache."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.ops.latent_cache import absorbed_weights, latent_cache, reference
from llmopt.ops.spec import Case, Inputs, OpSpec

# heads, rank, rope and nope dimensions, value dimension
DEEPSEEK_V2_LITE = {"heads": 16, "rank": 512, "rope": 64, "nope": 128, "v": 128}
DEEPSEEK_V3 = {**DEEPSEEK_V2_LITE, "heads": 128}


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, heads, rank, rope, nope, v; dtype of the cache; weights: their dtype or None; interleaved."""
    p = {"dtype": torch.float32, "weights": torch.uint8, "interleaved": True, **case.params}
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    tokens, heads, capacity = p["tokens"], p["heads"], 2 * p["tokens"] + 3
    angles = torch.arange(50)[:, None] * 100 ** -torch.linspace(0, 1, p["rope"] // 2)
    w_uk = None
    if p["weights"] is not None:
        kv_b = normal(heads * (p["nope"] + p["v"]), p["rank"]) * p["nope"] ** -0.5
        w_uk, _ = absorbed_weights(kv_b, heads=heads, nope=p["nope"], dtype=p["weights"])
    return {
        "q": normal(tokens, heads * (p["nope"] + p["rope"])),
        "kv_a": normal(tokens, p["rank"] + p["rope"]),
        "norm": normal(p["rank"]) * 0.1 + 1,
        "eps": 1e-6,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "position": torch.randint(50, (tokens,), generator=g, dtype=torch.int32),
        "seq": torch.arange(tokens, dtype=torch.int32) % 2,
        "slot": torch.randperm(capacity, generator=g)[:tokens].int(),
        "interleaved": p["interleaved"],
        "heads": heads,
        "w_uk": w_uk,
        "cache": normal(2, capacity, p["rank"] + p["rope"]).to(p["dtype"]),
    }


def run(**inputs: Any) -> torch.Tensor:
    """The query; the cache that is written is a copy."""
    dense = {k: inputs[k].contiguous() for k in ("cos", "sin", "w_uk") if inputs[k] is not None}
    return latent_cache(**{**inputs, **dense, "cache": inputs["cache"].clone(memory_format=torch.contiguous_format)})


def bytes_moved(
    *, q: torch.Tensor, kv_a: torch.Tensor, w_uk: torch.Tensor | None, heads: int, cache: torch.Tensor, **_: object
) -> int:
    weight = w_uk.numel() * w_uk.element_size() if w_uk is not None else 0
    size = cache.element_size()
    width = q.shape[1] if w_uk is None else heads * cache.shape[2]
    return weight + 4 * (q.numel() + kv_a.numel()) + size * (kv_a.numel() + q.shape[0] * width)


def flops(*, q: torch.Tensor, kv_a: torch.Tensor, w_uk: torch.Tensor | None, heads: int, cos: torch.Tensor,
          norm: torch.Tensor, **_: object) -> int:  # fmt: skip
    """The absorbed product, the rotations and the norm."""
    rope = 2 * cos.shape[1]
    absorbed = 0 if w_uk is None else 2 * norm.numel() * (q.shape[1] - heads * rope)
    return q.shape[0] * (absorbed + 3 * rope * (heads + 1) + 3 * norm.numel())


_SMALL = {"heads": 3, "rank": 64, "rope": 16, "nope": 32, "v": 16}
SPEC = OpSpec(
    name="latent_cache",
    run=run,
    reference=reference.latent_cache,
    make_inputs=make_inputs,
    cases=(
        Case("one_token", {**_SMALL, "tokens": 1}),
        Case("no_tokens", {**_SMALL, "tokens": 0}),
        *(Case(f"tokens_{t}", {**_SMALL, "tokens": t}) for t in (2, 5, 13)),
        Case("halves", {**_SMALL, "tokens": 3, "interleaved": False}),
        Case("not_absorbed", {**_SMALL, "tokens": 3, "weights": None}),
        Case("tails", {"heads": 2, "rank": 37, "rope": 6, "nope": 20, "v": 5, "tokens": 3}),
        Case(
            "tails_not_absorbed", {"heads": 2, "rank": 37, "rope": 6, "nope": 20, "v": 5, "tokens": 3, "weights": None}
        ),
        Case("bf16_weights", {**_SMALL, "tokens": 3, "weights": torch.bfloat16}),
        Case("f32_weights", {**_SMALL, "tokens": 5, "weights": torch.float32}),
        Case("group_128", {**_SMALL, "nope": 128, "tokens": 2}),
        *(
            Case(f"deepseek_v2_lite_t{t}", {**DEEPSEEK_V2_LITE, "tokens": t, "dtype": torch.bfloat16}, real=True)
            for t in (1, 8)
        ),
        Case("deepseek_v3_t1", {**DEEPSEEK_V3, "tokens": 1, "dtype": torch.bfloat16}, real=True),
    ),
    tolerance={torch.float32: (1e-5, 1e-4), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (1e-3, 2e-3)},
    bytes_moved=bytes_moved,
    flops=flops,
)
