"""The ``forward`` that a fused decoder stack has: transformers' signature, our engine inside.

What the engine does not cover goes through the stack's own forward, with the same modules, and is counted by reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmopt.runtime import fallbacks
from llmopt.runtime.cache import CACHE, KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.masks import visible_tokens
from llmopt.runtime.rows import Rows


class FusedForward:
    """Stands in for ``model.model.forward``.

    Args:
        stack: the decoder stack (``model.model``).
        engine: gives the engine for the modules as they are now.
        counts: reason -> calls that went through the stack's own forward.
    """

    def __init__(self, stack: nn.Module, engine: Callable[[], Engine], counts: dict[str, int]) -> None:
        self._stack, self._engine, self._fallbacks = stack, engine, counts
        self._own = stack.forward

    def __call__(
        self, input_ids: torch.Tensor | None = None, attention_mask: Any = None,
        position_ids: torch.Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None, use_cache: bool | None = None, *, cache: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        # transformers' name for it up to 5.23, and since
        cache = past_key_values if cache is None else cache
        stack: Any = self._stack
        keeps = bool(stack.config.use_cache if use_cache is None else use_cache)
        reason, keep = self._uncovered(input_ids, inputs_embeds, attention_mask, cache, kwargs)
        if isinstance(cache, KVCache):
            cache.order_for(own_layers=bool(reason))
        if reason:
            fallbacks.count(self._fallbacks, reason, "fuse_kernels: the model's own layers run")
            return self._own(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                inputs_embeds=inputs_embeds, use_cache=keeps, **{CACHE: cache}, **kwargs,
            )  # fmt: skip
        return self._run(input_ids, inputs_embeds, position_ids, cache, keeps, keep)

    @torch.no_grad()
    def _run(
        self, ids: torch.Tensor | None, embeds: torch.Tensor | None, position_ids: torch.Tensor | None,
        cache: KVCache | None, use_cache: bool, keep: torch.Tensor | None,
    ) -> Any:  # fmt: skip
        from transformers.modeling_outputs import MoeModelOutputWithPast

        engine = self._engine()
        given = ids if ids is not None else embeds
        assert given is not None
        batch, tokens = given.shape[:2]
        past = cache.length if cache is not None else 0
        if cache is None:
            cache = engine.new_cache(batch, past + tokens)
        cache.reserve(past + tokens)
        cache.start_after(keep)
        rows = Rows.of_batch(batch, tokens, past, position_ids, keep, given.device)
        h = torch.zeros(batch * tokens, engine.hidden_size, device=given.device)
        if ids is not None:
            engine.embed(ids.reshape(-1).contiguous(), h)
        else:
            h.copy_(given.reshape(batch * tokens, -1))
        some = h if keep is None else h[keep.reshape(-1)]
        positions = past + tokens if position_ids is None else int(position_ids.max()) + 1
        engine.hidden(some, rows, cache, positions, self._hooks(batch, tokens, keep))
        if keep is not None:
            h.zero_()
            h[keep.reshape(-1)] = some
        cache.length = past + tokens
        out = nn.functional.rms_norm(h, (h.shape[1],), engine.norm, engine.eps).view(batch, tokens, -1)
        return MoeModelOutputWithPast(last_hidden_state=out, **{CACHE: cache if use_cache else None})

    def _hooks(self, batch: int, tokens: int, keep: torch.Tensor | None) -> Callable[[int, torch.Tensor], None] | None:
        """Runs the forward hooks on the decoder layers, if there are any."""
        layers: Any = self._stack.layers
        if not any(layer._forward_hooks for layer in layers):
            return None

        def call(index: int, h: torch.Tensor) -> None:
            # a copy: whoever keeps it must not see the next layers work on it
            layer, shown = layers[index], torch.zeros(batch * tokens, h.shape[1], device=h.device)
            shown[slice(None) if keep is None else keep.reshape(-1)] = h
            shown = shown.view(batch, tokens, -1)
            for hook in list(layer._forward_hooks.values()):
                changed = hook(layer, (shown,), shown)
                if changed is not None:
                    shown = changed[0] if isinstance(changed, tuple) else changed
                    flat = shown.reshape(batch * tokens, -1)
                    h.copy_(flat if keep is None else flat[keep.reshape(-1)])

        return call

    def _uncovered(
        self, ids: torch.Tensor | None, embeds: torch.Tensor | None, mask: Any, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[str, torch.Tensor | None]:  # fmt: skip
        """Why a call goes through the stack's own forward, or ''; and which tokens are no padding (None: all)."""
        given = ids if ids is not None else embeds
        if given is None or (ids is not None and embeds is not None):
            return "neither input_ids nor inputs_embeds alone", None
        if given.device != self._engine().device:
            return f"inputs on {given.device.type}", None
        if cache is not None and not isinstance(cache, KVCache):
            return f"a {type(cache).__name__} instead of llmopt's cache", None
        if cache is not None and cache.sequences != given.shape[0]:
            return "a cache of another batch size", None
        if any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states", "output_router_logits")):
            return "attention weights, hidden states or router logits are asked for", None
        if torch.is_grad_enabled() and ((embeds is not None and embeds.requires_grad) or self._stack.training):
            return "gradients are wanted", None
        if _hooked_inside(self._stack):
            return "hooks on modules inside the decoder layers", None
        return visible_tokens(mask, given.shape[1], cache)


def _hooked_inside(stack: nn.Module) -> bool:
    layers: Any = stack.layers
    for layer in layers:
        if layer._forward_pre_hooks:
            return True
        for module in layer.modules():
            if module is not layer and (module._forward_hooks or module._forward_pre_hooks):
                return True
    return False
