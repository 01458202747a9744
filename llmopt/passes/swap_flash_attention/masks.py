"""Which keys a query sees, kept as small as it can be said.

None is plain causal (within a sliding window, where the layer has one), ``[B, Tk]`` bool is causal with padding, and a dense
bool ``[B, 1, Tq, Tk]`` is everything else: the unfilled tail of a static cache, packed sequences, custom masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Seen(NamedTuple):
    """A mask in one of the three forms, and what the first two leave to the implementation."""

    mask: torch.Tensor | None = None
    window: int | None = None
    causal: bool = True

    @property
    def is_dense(self) -> bool:
        return self.mask is not None and self.mask.dim() == 4

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """The same as bool ``[B or 1, 1 or H, Tq, Tk]``, True where a query sees a key."""
        if self.mask is not None and self.mask.dim() == 4:
            return self.mask
        key = torch.arange(num_keys, device=device)
        position = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        seen = (key <= position) if self.causal else torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        if self.window is not None:
            seen = seen & (key > position - self.window)
        return seen[None, None] if self.mask is None else seen & self.mask[:, None, None]

    def additive(self, query: torch.Tensor, num_keys: int) -> torch.Tensor:
        """The same as eager attention wants it: 0, or the lowest number of the query's dtype."""
        seen = self.dense(query.shape[2], num_keys, query.device)
        return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~seen, torch.finfo(query.dtype).min
        )


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask in its smallest form, as a function for transformers' ``AttentionMaskInterface``.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, use_vmap, config: as transformers gives them.
        attention_mask: ``[B, T]`` bool, True where there is a token.
        local_size: the sliding window of the layers that this mask is for.
        allow_is_causal_skip: False where transformers put more into ``mask_function`` than its name says.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    sliding = (
        local_size is not None
        and allow_is_causal_skip
        and not use_vmap
        and local_size == getattr(config, "sliding_window", None)
        and getattr(config, "attention_chunk_size", None) is None
    )
    if (function is causal_mask_function or sliding) and _ends_together(q_length, kv_length, q_offset, kv_offset):
        if attention_mask is None:
            return None
        keys = attention_mask[:, kv_offset : kv_offset + kv_length]
        if keys.shape[1] == kv_length:
            return keys if torch.compiler.is_compiling() or not bool(keys.all()) else None
    kwargs["allow_is_bidirectional_skip"] = False
    mask: torch.Tensor = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, **kwargs,
    )  # fmt: skip
    # a function that does not ask for the key gives a broadcast last dimension
    return mask if mask.stride(-1) == 1 else mask.contiguous()


def _ends_together(q_length: int, kv_length: int, q_offset: Any, kv_offset: int) -> bool:
    """The last query stands at the last key, as the compact forms take for granted."""
    if isinstance(q_offset, torch.Tensor) and torch.compiler.is_compiling():
        return False
    return int(q_offset) + q_length == kv_offset + kv_length


class Remembered:
    """The last result made from a mask. All layers of a forward pass get the same mask object; it is made once for them."""

    def __init__(self) -> None:
        self._held: tuple[weakref.ref[torch.Tensor], torch.Tensor | None] | None = None

    def get(self, mask: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor | None]) -> torch.Tensor | None:
        held = self._held
        if held is not None and held[0]() is mask:
            return held[1]
        made = make(mask)
        # the result goes when the mask goes
        self._held = (weakref.ref(mask, self._forget), made)
        return made

    def _forget(self, gone: weakref.ref[torch.Tensor]) -> None:
        if self._held is not None and self._held[0] is gone:
            self._held = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        return Remembered()

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()


def as_bool(mask: torch.Tensor) -> torch.Tensor | None:
    """An additive mask ``[B, 1 or H, Tq, Tk]`` as bool, or None where it holds more than "seen" and "not seen"."""
    seen = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return seen.contiguous() if bool((seen | hidden).all()) else None
