"""The preallocated KV cache: contiguous keys and values a head, that still is a transformers ``Cache``.

A step writes its token in place and reads what is there: nothing is copied, and nothing allocated until the capacity is
used up. On the CPU it is in huge pages. The slots are those of transformers' own caches, padding included, so that a layer's
own forward can use it too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmopt.arena import huge_block
from llmopt.errors import InputError
from llmopt.ops.rope_cache.reference import quantize

# what transformers calls a model's cache: in arguments, in generate's keywords and in outputs
CACHE = "cache" if any(f.name == "cache" for f in dataclasses.fields(BaseModelOutputWithPast)) else "past_key_values"

_GROWTH = 256  # slots; a cache that must grow doubles, and never by less


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: ``[S, Hk, C, D]`` buffers of which the first ``seen`` slots are filled."""

    is_croppable = True
    is_sliding = False

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()
        self.cache, self.index, self.seen = cache, index, 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        return None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states behind those seen, and return all of them, in the states' dtype: for a layer's own forward."""
        if self.index == 0:
            self.cache.order_for(own_layers=True)
        start, end = self.seen, self.seen + key_states.shape[-2]
        self.cache.reserve(end)
        self.seen = end
        parts, scales = self.cache.parts(self.index), self.cache.scales(self.index)
        states = zip((key_states, value_states), parts, scales, strict=True)
        keys, values = (_append(new, part, scale, start, end) for new, part, scale in states)
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        queries = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.seen + queries, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen = 0

    def crop(self, max_length: int) -> None:
        # transformers' assisted decoding takes tokens back by minus their number, and that of none is 0
        self.seen = min(self.seen, max_length if max_length > 0 else self.seen + max_length)


def _append(
    new: torch.Tensor, part: torch.Tensor, scale: torch.Tensor | None, start: int, end: int
) -> torch.Tensor:  # fmt: skip
    """Write ``new`` to slots ``[start, end)`` of one layer's keys or values, and read slots ``[0, end)`` in its dtype."""
    if scale is None:
        part[:, :, start:end] = new
        return part[:, :, :end].to(new.dtype)
    part[:, :, start:end], scale[:, :, start:end] = quantize(new)
    return (part[:, :, :end] * scale[:, :, :end, None]).to(new.dtype)


class KVCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers.

    Args:
        sequences: S.
        layers: number of layers.
        kv_heads: Hk.
        head_dims: sizes of a key and of a value.
        capacity: slots a sequence; more are allocated when needed.
        dtype: of keys and values; int8: each head of a token has a float32 scale of its own, beside the codes.
        latent_rank: of latent attention: a "key" then is a latent of this size with its rope key behind it, and there are
            no values. In int8 the rope key is bfloat16: :mod:`llmopt.ops.latent_cache.rows`.
        own_halves: the model's own layers keep rotated pairs as halves, (0, 2, 4, ..., 1, 3, 5, ...); the engine does not.
        device: of all buffers.

    Attributes:
        keys: ``[S, Hk, C, D]`` a layer; int8 latents: D bytes a row.
        values: likewise.
        key_scales: ``[S, Hk, C]`` float32 a layer, of an int8 cache; else empty.
        value_scales: likewise, but none of latents.

    Raises:
        InputError: int8 latents of an odd rank.
    """

    def __init__(
        self, sequences: int, layers: int, kv_heads: int, head_dims: tuple[int, int], capacity: int,
        dtype: torch.dtype, latent_rank: int | None = None, own_halves: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if dtype == torch.int8 and latent_rank is not None:
            if latent_rank % 2:
                raise InputError.argument("latent_rank", expected="an even number for int8", got=latent_rank)
            head_dims = (2 * head_dims[0] - latent_rank, head_dims[1])
        self.sequences, self.kv_heads, self.head_dims, self.dtype = sequences, kv_heads, head_dims, dtype
        self.latent_rank, self._own_halves, self._in_halves = latent_rank, own_halves, False
        self.capacity, self.device = 0, torch.device(device)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.key_scales: list[torch.Tensor] = []
        self.value_scales: list[torch.Tensor] = []
        self.start = torch.zeros(
            sequences, dtype=torch.int32, device=device
        )  # first slot of each sequence that is no padding
        self.step: Any = None  # the decode step recorded over these buffers, while a generate call has both
        super().__init__(layers=[KVLayer(self, i) for i in range(layers)])
        self.reserve(capacity)

    @property
    def length(self) -> int:
        """Slots filled, padding included."""
        return int(self.layers[0].seen)

    @length.setter
    def length(self, value: int) -> None:
        for layer in self.layers:
            layer.seen = value

    @property
    def query_dtype(self) -> torch.dtype:
        """Of the queries and outputs of attention over this cache."""
        return torch.bfloat16 if self.dtype == torch.int8 else self.dtype

    def tensors(self) -> list[torch.Tensor]:
        """All buffers: ``[S, Hk, C, D]``, and of an int8 cache ``[S, Hk, C]``."""
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]

    def scales(self, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``[S, Hk, C]`` float32, of what :meth:`parts` gives; None of what is not int8."""
        keys, values = (scales[layer] if scales else None for scales in (self.key_scales, self.value_scales))
        return keys, values

    def latents(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows ``[S, C, D]`` of latent attention, and of int8 ones the scales ``[S, C]``."""
        return self.keys[layer][:, 0], self.key_scales[layer][:, 0] if self.key_scales else None

    def parts(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer's own forward takes for keys and values: of latent attention, latents and rope keys."""
        if self.latent_rank is None:
            return self.keys[layer], self.values[layer]
        latents, rope = self.keys[layer].tensor_split([self.latent_rank], dim=-1)
        return latents, rope.view(torch.bfloat16) if self.dtype == torch.int8 else rope

    def order_for(self, *, own_layers: bool) -> None:
        """Bring what is cached into the order in which the model's own layers, or the engine, keep it."""
        halves = self._own_halves and own_layers
        if halves == self._in_halves or self.latent_rank is None:
            return
        self._in_halves = halves
        for layer in range(len(self.layers)):
            rotated = self.parts(layer)[1][:, :, : self.length]
            pairs = rotated.unflatten(-1, (-1, 2) if halves else (2, -1))
            rotated.copy_(pairs.transpose(-1, -2).flatten(-2))

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` slots; what is there is kept."""
        if capacity <= self.capacity:
            return
        if self.capacity:
            capacity = max(capacity, 2 * self.capacity, self.capacity + _GROWTH)
        used = max(layer.seen for layer in self.layers)
        old = self.tensors()
        self._allocate(capacity)
        for before, now in zip(old, self.tensors(), strict=False):  # at first there is nothing before
            now[:, :, :used] = before[:, :, :used]
        self.capacity = capacity

    def _allocate(self, capacity: int) -> None:
        layers, tokens = len(self.layers), self.sequences * self.kv_heads * capacity
        shape = (self.sequences, self.kv_heads, capacity)
        sizes = [tokens * dim for dim in self.head_dims]
        parts = self._block(sum(sizes) * layers * self.dtype.itemsize).view(self.dtype).split(sizes * layers)
        self.keys = [k.view(*shape, self.head_dims[0]) for k in parts[::2]]
        self.values = [v.view(*shape, self.head_dims[1]) for v in parts[1::2]]
        if self.dtype == torch.int8:
            kinds = 2 if self.latent_rank is None else 1
            scales = self._block(kinds * layers * tokens * torch.float32.itemsize).view(torch.float32).split(tokens)
            self.key_scales = [k.view(shape) for k in scales[::kinds]]
            self.value_scales = [v.view(shape) for v in scales[1::2]] if kinds == 2 else []

    def _block(self, size: int) -> torch.Tensor:
        if self.device.type == "cpu":
            return huge_block(size)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    # ---- what transformers asks of a cache beyond its layers

    def start_after(self, keep: torch.Tensor | None) -> None:
        """Take note of the padding on the left of a prompt: ``keep`` [S, tokens] bool, None: there is none."""
        if self.length:
            return
        self.start.zero_()
        if keep is not None:
            self.start.copy_(keep.int().argmax(-1))

    def crop(self, max_length: int) -> None:
        """Forget all but the first ``max_length`` slots; up to 0: the last ``-max_length`` ones."""
        for layer in self.layers:
            layer.crop(max_length)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.length, self._in_halves = 0, False
        self.start.zero_()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        self._select(torch.arange(self.sequences, device=self.device).repeat_interleave(repeats))

    def _select(self, indices: torch.Tensor) -> None:
        if indices.dim() != 1:
            raise InputError.argument("indices", expected="one dimension", got=list(indices.shape))
        length = self.length
        if len(indices) == self.sequences:
            for tensor in self.tensors():
                tensor[:, :, :length] = tensor[indices, :, :length]
            self.start.copy_(self.start[indices])  # in place: recorded steps know its address
            return
        self.step = None
        old = self.tensors()
        self.sequences = len(indices)
        self._allocate(self.capacity)
        for before, now in zip(old, self.tensors(), strict=True):
            now[:, :, :length] = before[indices, :, :length]
        self.start = self.start[indices]
