"""The attention function and mask function that stand behind the names given to transformers' interfaces.

Masks stay compact: None for plain causal, ``[B, Tk]`` for causal with padding, a dense bool ``[B, 1, Tq, Tk]`` for
everything else (static caches, packed sequences, sliding windows, custom 4-D masks).
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmopt.ops.attention import attention

_LOG = logging.getLogger("llmopt")

# what a candidate runs: (module, query, key, value, compact mask, scaling) -> [B, Tq, H, V]
Candidate = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]

# reasons for which a call went through eager attention, process-wide; each is logged once
fallbacks: Counter[str] = Counter()


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask for our attention function, in the form of ``AttentionMaskInterface``."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = mask_function or causal_mask_function
    plain = function is causal_mask_function and isinstance(q_offset, int) and kv_offset == 0
    if plain and kv_length == q_offset + q_length:
        if attention_mask is None or bool(attention_mask[:, :kv_length].all()):
            return None
        if attention_mask.shape[1] == kv_length:
            return attention_mask
    kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    return mask


def dense_mask(mask: torch.Tensor | None, q_length: int, kv_length: int) -> torch.Tensor:
    """A compact mask spelt out: bool ``[B or 1, 1, Tq, Tk]``, True where a query may see a key."""
    if mask is not None and mask.dim() == 4:
        return mask
    rows = torch.arange(kv_length - q_length, kv_length)[:, None]
    causal = (torch.arange(kv_length)[None] <= rows)[None, None]
    return causal if mask is None else causal & mask[:, None, None].bool()


def run_llmopt(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Our CPU kernel."""
    if mask is not None and mask.dim() == 4:
        return attention(q, k, v, scale=scaling, causal=False, mask=mask)
    return attention(q, k, v, scale=scaling, key_mask=mask)


def run_sdpa(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, called as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = mask is None and (q.shape[2] == 1 or q.shape[2] == k.shape[2])
    dense = None if plain else dense_mask(mask, q.shape[2], k.shape[2]).to(q.device)
    out: torch.Tensor = sdpa_attention_forward(module, q, k, v, dense, scaling=scaling)[0]
    return out


def run_flash_attn(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The flash-attn package, through transformers' own integration; dense masks, which it cannot take, go to SDPA."""
    if mask is not None and mask.dim() == 4:
        return run_sdpa(module, q, k, v, mask, scaling)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    out: torch.Tensor = ALL_ATTENTION_FUNCTIONS["flash_attention_2"](module, q, k, v, mask, scaling=scaling)[0]
    return out


CANDIDATES: dict[str, Candidate] = {"llmopt": run_llmopt, "sdpa": run_sdpa, "flash_attn": run_flash_attn}


def run_eager(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    dropout: float, kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The model's own eager attention, for what the kernels do not cover (attention weights, dropout, soft caps)."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    if mask is None or mask.dtype == torch.bool or mask.dim() == 2:
        seen = dense_mask(mask, q.shape[2], k.shape[2])
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    result: tuple[torch.Tensor, torch.Tensor | None] = eager(
        module, q, k, v, mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def uncovered(
    q: torch.Tensor, mask: torch.Tensor | None, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]
) -> str:
    """Why a call must go through eager attention, or ''."""
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    if dropout:
        return "dropout"
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        return "soft cap or position bias"
    if is_causal is False:
        return "not causal"
    if mask is not None and mask.dim() == 4 and mask.is_floating_point():
        return "an additive 4-D mask"
    if torch.is_grad_enabled() and q.requires_grad:
        return "gradients are wanted"
    return ""


def attention_function(prefill: str, decode: str) -> Callable[..., Any]:
    """A function for ``AttentionInterface`` that runs one candidate for many queries and one for a single query."""
    by_length = {False: CANDIDATES[prefill], True: CANDIDATES[decode]}

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
        is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        absorbed = getattr(module, "llmopt_mla", None)
        if absorbed is not None and absorbed.holds_latent(key):
            if not (reason := uncovered(query, attention_mask, dropout, is_causal, kwargs)):
                result: torch.Tensor = absorbed.run(query, key, value, attention_mask, scale, by_length[False])
                return result, None
            key, value = absorbed.expand(key, value)
        elif not (reason := uncovered(query, attention_mask, dropout, is_causal, kwargs)):
            return by_length[query.shape[2] == 1](module, query, key, value, attention_mask, scale), None
        if not fallbacks[reason]:
            _LOG.warning("swap_flash_attention: eager attention runs where %s", reason)
        fallbacks[reason] += 1
        return run_eager(module, query, key, value, attention_mask, scale, dropout, kwargs)

    return forward


def register(prefill: str, decode: str) -> str:
    """Register the pair with transformers (additive, once) and return the name to put into a config."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = f"llmopt_{prefill}" if prefill == decode else f"llmopt_{prefill}_{decode}"
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attention_function(prefill, decode))
        AttentionMaskInterface.register(name, compact_mask)
    return name
