"""Attention masks ``[batch, tokens]`` as transformers gives them: which tokens are no padding, and where each stands."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.runtime.cache import KVCache


def visible_tokens(mask: Any, tokens: int, cache: KVCache | None) -> tuple[str, torch.Tensor | None]:
    """Why a mask is not covered, or ''; and which of the new tokens are no padding (None: all)."""
    past = cache.length if cache is not None else 0
    if mask is None:
        started = cache is not None and past > 0 and bool(cache.start.any())
        return ("no mask for a cache that holds padding" if started else ""), None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return "a mask that is not [batch, tokens]", None
    if mask.shape[1] != past + tokens:
        return "a mask of another length than the tokens", None
    visible = mask.bool()
    start = visible.int().argmax(-1).to(torch.int32)
    # each sequence: padding, then tokens without a hole up to the end
    if not torch.equal(visible.sum(-1), mask.shape[1] - start) or not visible[:, -1].all():
        return "padding on the right or holes in the mask", None
    if past > 0 and cache is not None and not torch.equal(start, cache.start):
        return "a mask that hides cached tokens", None
    return "", (None if past > 0 or not start.any() else visible)


def rope_positions(mask: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Rope positions ``[batch, tokens]`` as transformers counts them: padding does not count."""
    if mask is None:
        return torch.arange(shape[1], device=device).expand(shape)
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
