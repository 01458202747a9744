"""The attention function behind the name given to transformers' ``AttentionInterface``, and what it may run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.attention import attention
from llmopt.passes.swap_flash_attention.masks import Remembered, Seen, as_bool, compact_mask
from llmopt.runtime import fallbacks

# "flash" in a name would make transformers prepare inputs for the flash-attn package
INTERFACE_NAME = "llmopt_attention"

# queries up to which a call counts as decoding: speculation and short continuations are bound by memory as well
DECODE_QUERIES = 8

# what a candidate runs: (module, query, key, value, seen, scaling) -> [B, Tq, H, V]
Candidate = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, Seen, float], torch.Tensor]


@dataclass(slots=True)
class Plan:
    """What one model runs; each of its attention modules holds it as ``llmopt_attention`` while the pass is on."""

    prefill: str = "llmopt"
    decode: str = "llmopt"
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> calls that went through eager attention
    bool_masks: Remembered = field(default_factory=Remembered)


def run_llmopt(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scaling: float
) -> torch.Tensor:
    """Our kernel: C++ on the CPU, Triton on a GPU."""
    return attention(q, k, v, scale=scaling, **mask_options(seen))


def mask_options(seen: Seen) -> dict[str, Any]:
    """``seen`` as options of the op."""
    if seen.is_dense:
        return {"mask": seen.mask, "causal": False}
    return {"key_mask": seen.mask, "causal": seen.causal, "window": seen.window}


def run_sdpa(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scaling: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, called as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries, keys = q.shape[2], k.shape[2]
    unmasked = seen.mask is None and (seen.window is None or seen.window >= keys)
    if unmasked and (queries in (1, keys) or not seen.causal):
        mask = None
    elif queries == 1 and not seen.is_dense and (seen.window is None or seen.window >= keys):
        mask = seen.mask[:, None, None] if seen.mask is not None else None
    elif q.device.type == "cpu" and native.available() and q.dtype in KERNEL_DTYPES:
        # a dense mask would have to be made, and SDPA would copy keys and values for every query head
        return run_llmopt(module, q, k, v, seen, scaling)
    else:
        mask = seen.dense(queries, keys, q.device)
    out: torch.Tensor = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=seen.causal)[0]
    return out


def run_flash_attn(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scaling: float
) -> torch.Tensor:
    """The flash-attn package, through transformers' own integration; dense masks, which it cannot take, go to SDPA."""
    if seen.is_dense:
        return run_sdpa(module, q, k, v, seen, scaling)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    out: torch.Tensor = ALL_ATTENTION_FUNCTIONS["flash_attention_2"](
        module, q, k, v, seen.mask, scaling=scaling, sliding_window=seen.window, is_causal=seen.causal
    )[0]
    return out


def run_cudnn(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scaling: float
) -> torch.Tensor:
    """torch SDPA that asks cuDNN first; what cuDNN does not take goes to torch's other kernels."""
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return run_sdpa(module, q, k, v, seen, scaling)


_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CANDIDATES: dict[str, Candidate] = {
    "llmopt": run_llmopt, "sdpa": run_sdpa, "cudnn": run_cudnn, "flash_attn": run_flash_attn
}  # fmt: skip


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one module, for transformers' ``AttentionInterface``.

    Attention weights, dropout, soft caps, biases and gradients are not the kernels' business: such calls go through the
    model's own eager attention, are counted in the plan, and logged once a reason.

    Args:
        query: ``[B, H, Tq, K]``.
        key, value: ``[B, Hk, Tk, K]`` and ``[B, Hk, Tk, V]``; of a module in latent form, latents and rope keys.
        attention_mask: from :func:`compact_mask`, or a 4-D mask of the caller's.

    Returns:
        ``([B, Tq, H, V], None)``, or with the attention weights where they were asked for.

    Raises:
        InputError: a paged cache (continuous batching).
    """
    # not getattr: where there is none, nn.Module raises and formats an error, in every layer of every token
    own = vars(module)
    plan: Plan = own.get("llmopt_attention", _DEFAULT)
    latent: Any = module._modules.get("llmopt_latent")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    seen = Seen(attention_mask, sliding_window, is_causal is not False)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        seen = seen._replace(mask=plan.bool_masks.get(attention_mask, as_bool))
    reason = _uncovered(query, key, seen, attention_mask, dropout, kwargs)
    if reason:
        fallbacks.count(plan.fallbacks, reason, "swap_flash_attention: eager attention runs")
        if latent is not None:
            key, value = latent.expand(key, value)
        mask = attention_mask
        if mask is None or mask.dtype == torch.bool:
            mask = seen.additive(query, key.shape[2])
        return _eager_of(module)(module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs)
    name = plan.decode if query.shape[2] <= DECODE_QUERIES else plan.prefill
    if latent is not None:
        return latent.run(query, key, value, seen, scale, name), None
    return CANDIDATES[name](module, query, key, value, seen, scale), None


_DEFAULT = Plan()
_ALTERS_SCORES = ("softcap", "s_aux", "position_bias", "head_mask")


def _uncovered(
    query: torch.Tensor, key: torch.Tensor, seen: Seen, given: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str:  # fmt: skip
    """Why a call must go through eager attention, or ''."""
    if kwargs.get("cache") is not None:
        raise InputError("attention: expected no paged cache (continuous batching); optimize() serves generate() only")
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if dropout:
        return "dropout is on"
    for name in _ALTERS_SCORES:
        if kwargs.get(name) is not None:
            return f"{name} is given"
    if given is not None and seen.mask is None:
        return "the 4-D mask is a bias, not a mask"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "gradients are wanted (no torch.no_grad())"
    return ""


def _eager_of(module: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The eager function of the file the module's class comes from, which its forward would use."""
    eager: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return eager


def register() -> str:
    """Make the functions known to transformers (an addition, once a process); returns the name for a config."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if INTERFACE_NAME not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionInterface.register(INTERFACE_NAME, attention_function)
        AttentionMaskInterface.register(INTERFACE_NAME, compact_mask)
    return INTERFACE_NAME
