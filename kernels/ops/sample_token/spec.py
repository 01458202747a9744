"""Cases, tolerances and traffic of sample_token."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.ops import shapes
from llmopt.ops.sample_token import reference, sample_token
from llmopt.ops.spec import Case, Inputs, OpSpec


def make_inputs(case: Case, seed: int) -> Inputs:
    """Params: tokens, vocab, and the settings, each one value or one a token; ties: whole numbers."""
    p = case.params
    tokens, generator = p["tokens"], torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, p["vocab"], generator=generator) * 4
    noise = torch.empty_like(logits).exponential_(generator=generator)
    settings = torch.empty(tokens, 4)
    for column, (name, off) in enumerate((("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))):
        settings[:, column] = torch.tensor(p.get(name, off))
    return {"logits": logits.round() if p.get("ties") else logits, "noise": noise, "settings": settings}


def _outputs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    return ids, torch.empty_like(ids)


def run(logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    """The op with outputs of its own.

    Args:
        logits: see :func:`sample_token`.
        noise: likewise.
        settings: likewise.

    Returns:
        ``[2, T]`` int64: ids and chosen.

    Raises:
        InputError: shapes or dtypes do not fit together.
    """
    ids, chosen = _outputs(logits)
    sample_token(logits, noise, settings, ids, chosen)
    return torch.stack([ids, chosen])


def expected(logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    chosen = reference.sample_token(logits, noise, settings)
    return torch.stack([chosen.clamp(min=0), chosen])


def torch_arguments(**inputs: torch.Tensor) -> Inputs:
    ids, chosen = _outputs(inputs["logits"])
    return {**inputs, "ids": ids, "chosen": chosen}


def bytes_moved(logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor) -> int:
    """The logits; of the noise, what filters leave, which is little, or all."""
    unfiltered = not ((settings[:, 1] > 0) | (settings[:, 2] < 1) | (settings[:, 3] > 0)).any()
    return logits.numel() * 4 * (2 if unfiltered else 1) + settings.numel() * 4 + logits.shape[0] * 16


def flops(logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor) -> int:
    """One comparison a logit."""
    return logits.numel()


def _transformers(logits: torch.Tensor, noise: torch.Tensor, settings: torch.Tensor) -> Any:
    """What transformers does in its place: a pass over all logits, or several, for each filter."""
    from transformers.generation import logits_process as hf

    temperature, top_k, top_p, min_p = settings[0].tolist()
    warpers: list[Any] = [hf.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(hf.TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        warpers.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(hf.MinPLogitsWarper(min_p))
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    return (scores.softmax(-1) / noise).argmax(-1)


_VOCAB = shapes.HEAD_QWEN3_0_6B[0]
_USUAL = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
_EACH = {
    "temperature": [1.0, 0.6, 1.5, 0.0, 0.7, 0.3], "top_k": [0, 20, 5, 0, 1, 900], "top_p": [1.0, 0.9, 0.5, 1.0, 1.0, 0.3],
    "min_p": [0.0, 0.0, 0.1, 0.0, 0.0, 0.05],
}  # fmt: skip
SPEC = OpSpec(
    name="sample_token",
    run=run,
    reference=expected,
    make_inputs=make_inputs,
    cases=(
        Case("one_value", {"tokens": 1, "vocab": 1, **_USUAL}),
        Case("no_tokens", {"tokens": 0, "vocab": 10}),
        *(Case(f"tokens_{t}", {"tokens": t, "vocab": 77, **_USUAL}) for t in (2, 3, 9, 17)),
        *(Case(f"vocab_{v}", {"tokens": 2, "vocab": v, **_USUAL}) for v in (2, 15, 16, 17, 255, 256, 257, 1030, 5000)),
        Case("temperature", {"tokens": 2, "vocab": 5003, "temperature": 0.8}),
        Case("temperature_0", {"tokens": 2, "vocab": 5003, "temperature": 0.0}),
        Case("top_k_1", {"tokens": 2, "vocab": 5003, "top_k": 1}),
        Case("top_k_many", {"tokens": 2, "vocab": 5003, "top_k": 700, "temperature": 3.0}),
        Case("top_p", {"tokens": 2, "vocab": 5003, "top_p": 0.9, "temperature": 3.0}),
        Case("top_p_0", {"tokens": 2, "vocab": 5003, "top_p": 0.0}),
        Case("min_p", {"tokens": 2, "vocab": 5003, "min_p": 0.02, "temperature": 2.0}),
        Case("top_p_min_p", {"tokens": 2, "vocab": 5003, "top_p": 0.8, "min_p": 0.1, "temperature": 2.0}),
        Case("each_its_own", {"tokens": 6, "vocab": 3000, **_EACH}),
        *(Case(f"ties_{v}", {"tokens": 3, "vocab": v, "ties": True, **_USUAL}) for v in (40, 700, 70000)),
        Case("three_shares", {"tokens": 3, "vocab": 140001, **_USUAL}),
        Case("qwen3_t1", {"tokens": 1, "vocab": _VOCAB, **_USUAL}, real=True),
        Case("qwen3_t8", {"tokens": 8, "vocab": _VOCAB, **_USUAL}, real=True),
        Case("qwen3_t1_top_p", {"tokens": 1, "vocab": _VOCAB, "temperature": 0.6, "top_p": 0.95}, real=True),
        Case("qwen3_t1_all", {"tokens": 1, "vocab": _VOCAB, "temperature": 0.6}, real=True),
    ),
    tolerance={torch.float32: (0.0, 0.0)},
    bytes_moved=bytes_moved,
    flops=flops,
    torch_arguments=torch_arguments,
    rivals={"transformers": _transformers},
)
