"""Cases, tolerances, traffic and rivals of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llmopt.ops.attention import attention, reference
from llmopt.ops.spec import Case, Inputs, OpSpec

# (heads, key/value heads, head size of q and k, head size of v, rope part of q and k) of published models
QWEN3_0_6B = {"h": 16, "hk": 8, "d": 128, "dv": 128}
QWEN3_30B_A3B = {"h": 32, "hk": 4, "d": 128, "dv": 128}
ERNIE_4_5_0_3B = {"h": 16, "hk": 2, "d": 128, "dv": 128}
DEEPSEEK_V2_LITE = {"h": 16, "hk": 16, "d": 128, "dv": 128, "rope": 64}
DEEPSEEK_V2_LITE_LATENT = {"h": 16, "hk": 1, "d": 512, "dv": 512, "rope": 64, "latent": True}


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: b, h, hk, tq, tk, d, dv, rope, dtype; causal, window; key_mask, mask, latent (v is k); extreme."""
    p = {"b": 1, "hk": case.params["h"], "dtype": torch.float32, **case.params}
    g = torch.Generator().manual_seed(seed)
    dv, rope, dtype = p.get("dv", p["d"]), p.get("rope", 0), p["dtype"]

    def normal(heads: int, tokens: int, dim: int) -> torch.Tensor:
        return torch.randn(p["b"], heads, tokens, dim, generator=g).to(dtype)

    k = normal(p["hk"], p["tk"], p["d"])
    key_mask = mask = None
    if p.get("key_mask"):
        key_mask = torch.rand(p["b"], p["tk"], generator=g) > 0.3
        key_mask[0] = torch.arange(p["tk"]) >= p["tk"] // 3  # left padding
    if p.get("mask"):
        batch, heads = p["mask"]
        mask = torch.rand(batch, heads, p["tq"], p["tk"], generator=g) > 0.3
    return {
        "q": normal(p["h"], p["tq"], p["d"]) * p.get("extreme", 1.0),
        "k": k,
        "v": k if p.get("latent") else normal(p["hk"], p["tk"], dv),
        "scale": (p["d"] + rope) ** -0.5,
        "causal": p.get("causal", True),
        "window": p.get("window"),
        "key_mask": key_mask,
        "mask": mask,
        "q_rope": normal(p["h"], p["tq"], rope) if rope else None,
        "k_rope": normal(p["hk"] if p.get("rope_heads") else 1, p["tk"], rope) if rope else None,
    }


def _size(x: torch.Tensor | None) -> int:
    return x.numel() * x.element_size() if x is not None else 0


def bytes_moved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> int:
    """Each tensor once; a v that is a view of k costs nothing more."""
    out = q.shape[0] * q.shape[1] * q.shape[2] * v.shape[3] * q.element_size()
    values = 0 if v.data_ptr() == k.data_ptr() else _size(v)
    others = sum(_size(rest.get(name)) for name in ("q_rope", "k_rope", "key_mask", "mask"))
    return _size(q) + _size(k) + values + others + out


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> int:
    """Both products, for the pairs of query and key that causality and window leave; masks count as if all were seen."""
    seen = reference.visible(q, k, causal=rest.get("causal", True), window=rest.get("window"))
    q_rope = rest.get("q_rope")
    dims = q.shape[3] + v.shape[3] + (q_rope.shape[3] if q_rope is not None else 0)
    return 2 * dims * q.shape[0] * q.shape[1] * int(seen.sum())


def _whole(x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    return x if rope is None else torch.cat([x, rope.expand(-1, x.shape[1], -1, -1)], dim=-1)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> Callable[[], torch.Tensor]:
    """transformers' eager attention: repeat_kv, matmul, additive mask, float32 softmax, matmul."""
    q, k = _whole(q, rest.get("q_rope")), _whole(k, rest.get("k_rope"))
    options: dict[str, Any] = {name: rest.get(name) for name in ("causal", "window", "key_mask", "mask")}
    seen = reference.visible(q, k, **options)
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    group, scale = q.shape[1] // k.shape[1], rest["scale"]

    def repeat_kv(x: torch.Tensor) -> torch.Tensor:
        b, h, t, d = x.shape
        return x[:, :, None].expand(b, h, group, t, d).reshape(b, h * group, t, d)

    def run() -> torch.Tensor:
        scores = q @ repeat_kv(k).transpose(2, 3) * scale + bias
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return (weights @ repeat_kv(v)).transpose(1, 2).contiguous()

    return run


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> Callable[[], torch.Tensor]:
    """torch's scaled_dot_product_attention, with is_causal where that is enough."""
    q, k = _whole(q, rest.get("q_rope")), _whole(k, rest.get("k_rope"))
    options: dict[str, Any] = {name: rest.get(name) for name in ("causal", "window", "key_mask", "mask")}
    plain = options["window"] is None and options["key_mask"] is None and options["mask"] is None
    is_causal = plain and bool(options["causal"]) and q.shape[2] == k.shape[2]
    unmasked = plain and (not options["causal"] or q.shape[2] == 1)
    seen = None if is_causal or unmasked else reference.visible(q, k, **options)

    def run() -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=is_causal, scale=rest["scale"], enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).contiguous()

    return run


def _real(name: str, shape: dict[str, int], *tokens: tuple[int, int]) -> list[Case]:
    """Cases ``(queries, keys)`` of a published shape."""
    return [
        Case(f"{name}_q{tq}_k{tk}", {**shape, "tq": tq, "tk": tk, "dtype": torch.bfloat16}, real=True)
        for tq, tk in tokens
    ]


_SMALL = {"h": 4, "hk": 2, "d": 32}
SPEC = OpSpec(
    name="attention",
    run=attention,
    reference=reference.attention,
    make_inputs=make_inputs,
    cases=(
        Case("one_key", {"h": 2, "hk": 1, "tq": 1, "tk": 1, "d": 16}),
        Case("no_batch", {"b": 0, "h": 2, "hk": 1, "tq": 3, "tk": 5, "d": 16}),
        Case("no_queries", {"h": 2, "hk": 1, "tq": 0, "tk": 5, "d": 16}),
        *(Case(f"tokens_{t}", {**_SMALL, "b": 2, "tq": t, "tk": t}) for t in (1, 7, 63, 64, 127)),
        *(Case(f"depth_{t}", {**_SMALL, "tq": 1, "tk": t}) for t in (1, 65, 1000)),
        *(Case(f"head_size_{d}", {"h": 4, "hk": 2, "tq": 9, "tk": 70, "d": d}) for d in (1, 20, 32, 60, 64, 80, 192)),
        *(Case(f"head_size_{d}_decode", {"h": 4, "hk": 2, "tq": 1, "tk": 70, "d": d}) for d in (1, 20, 60, 80, 192)),
        Case("head_size_576", {"h": 2, "tq": 3, "tk": 40, "d": 576, "dv": 512}),
        *(Case(f"value_size_{v}", {"h": 2, "tq": 30, "tk": 30, "d": 48, "dv": v}) for v in (1, 24, 33, 128)),
        *(Case(f"group_{n}", {"h": n * 2, "hk": 2, "tq": 5, "tk": 130, "d": 64}) for n in (1, 2, 3, 5, 8, 16)),
        Case("chunk_after_cache", {**_SMALL, "tq": 40, "tk": 100}),
        Case("more_queries_than_keys", {**_SMALL, "tq": 20, "tk": 7}),
        Case("not_causal", {**_SMALL, "tq": 20, "tk": 33, "causal": False}),
        *(Case(f"window_{w}", {**_SMALL, "tq": 70, "tk": 200, "window": w}) for w in (1, 10, 64, 500)),
        Case("window_decode", {**_SMALL, "tq": 1, "tk": 300, "window": 100}),
        Case("key_mask", {**_SMALL, "b": 3, "tq": 70, "tk": 70, "key_mask": True}),
        Case("key_mask_decode", {**_SMALL, "b": 3, "tq": 1, "tk": 200, "key_mask": True}),
        Case("key_mask_window", {**_SMALL, "b": 2, "tq": 1, "tk": 200, "key_mask": True, "window": 50}),
        *(
            Case(f"mask_{b}_{h}", {**_SMALL, "b": 2, "tq": 50, "tk": 90, "causal": False, "mask": (b, h)})
            for b in (1, 2)
            for h in (1, 4)
        ),
        Case("all_masks", {**_SMALL, "b": 2, "tq": 9, "tk": 90, "key_mask": True, "mask": (2, 4), "window": 40}),
        Case("rope", {**_SMALL, "b": 2, "tq": 30, "tk": 90, "rope": 16}),
        Case("rope_tail", {"h": 4, "hk": 2, "d": 20, "tq": 30, "tk": 90, "rope": 12, "rope_heads": True}),
        Case("latent", {"b": 2, "h": 4, "hk": 1, "tq": 1, "tk": 90, "d": 64, "rope": 32, "latent": True}),
        Case("latent_chunk", {"b": 2, "h": 16, "hk": 1, "tq": 9, "tk": 90, "d": 64, "rope": 32, "latent": True}),
        # a float32 score of size s is off by s * 2**-24, and so is every weight: 10 keeps that below the tolerance
        Case("large_logits", {**_SMALL, "tq": 40, "tk": 70, "extreme": 10.0}),
        *_real("qwen3_0.6b", QWEN3_0_6B, (1, 128), (1, 4096), (128, 128), (1024, 1024)),
        *_real("qwen3_30b_a3b", QWEN3_30B_A3B, (1, 4096)),
        *_real("ernie_4.5_0.3b", ERNIE_4_5_0_3B, (1, 128), (1, 4096), (128, 128), (1024, 1024)),
        *_real("deepseek_v2_lite", DEEPSEEK_V2_LITE, (128, 128), (1024, 1024)),
        *_real("deepseek_v2_lite_latent", DEEPSEEK_V2_LITE_LATENT, (1, 128), (1, 4096)),
    ),
    tolerance={torch.float32: (1e-5, 2e-5), torch.bfloat16: (1.6e-2, 4e-3), torch.float16: (2e-3, 1e-3)},
    bytes_moved=bytes_moved,
    flops=flops,
    rivals={"eager": eager, "sdpa": sdpa},
)
