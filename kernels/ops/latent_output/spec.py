"""Cases, tolerances and traffic of latent_output."""

from __future__ import annotations

import torch

from llmopt.ops.latent_cache import absorbed_weights
from llmopt.ops.latent_output import latent_output, reference
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, heads, rank, v; dtype of the latents; weights: their dtype."""
    p = {"dtype": torch.float32, "weights": torch.uint8, **case.params}
    g = torch.Generator().manual_seed(seed)
    kv_b = torch.randn(p["heads"] * (16 + p["v"]), p["rank"], generator=g) * p["rank"] ** -0.5
    _, w_uv = absorbed_weights(kv_b, heads=p["heads"], nope=16, dtype=p["weights"])
    latent = torch.randn(p["tokens"], p["heads"], p["rank"], generator=g).to(p["dtype"])
    return {"latent": latent, "w_uv": w_uv, "v_dim": p["v"]}


def run(latent: torch.Tensor, w_uv: torch.Tensor, v_dim: int) -> torch.Tensor:
    """The op itself takes no copies."""
    return latent_output(latent.contiguous(), w_uv.contiguous(), v_dim=v_dim)


def bytes_moved(*, latent: torch.Tensor, w_uv: torch.Tensor, v_dim: int) -> int:
    out = latent.shape[0] * latent.shape[1] * v_dim * 4
    return w_uv.numel() * w_uv.element_size() + latent.numel() * latent.element_size() + out


def flops(*, latent: torch.Tensor, w_uv: torch.Tensor, v_dim: int) -> int:
    return 2 * latent.numel() * v_dim


_SMALL = {"heads": 3, "rank": 64, "v": 32}
_LITE = {"heads": 16, "rank": 512, "v": 128}
SPEC = OpSpec(
    name="latent_output",
    run=run,
    reference=reference.latent_output,
    make_inputs=make_inputs,
    cases=(
        Case("one_token", {**_SMALL, "tokens": 1}),
        Case("no_tokens", {**_SMALL, "tokens": 0}),
        *(Case(f"tokens_{t}", {**_SMALL, "tokens": t}) for t in (2, 5, 13)),
        Case("tails", {"heads": 2, "rank": 37, "v": 21, "tokens": 3}),
        Case("bf16_weights", {**_SMALL, "tokens": 3, "weights": torch.bfloat16}),
        Case("f32_weights", {**_SMALL, "tokens": 5, "weights": torch.float32}),
        *(Case(f"deepseek_v2_lite_t{t}", {**_LITE, "tokens": t, "dtype": torch.bfloat16}, real=True) for t in (1, 8)),
        Case("deepseek_v3_t1", {**_LITE, "heads": 128, "tokens": 1, "dtype": torch.bfloat16}, real=True),
    ),
    # the result is float32 whatever the latents are
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-5, 1e-4)),
    bytes_moved=bytes_moved,
    flops=flops,
)
