"""One part of a decode step as a function of its tensors, to be exported and compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from llmopt.passes.compile_tvm.tensors import signature, tensors_of, with_tensors
from llmopt.runtime.blocks import Context, Rope, Workspace
from llmopt.runtime.cache import KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.rows import Rows

Run = Callable[[Any, torch.Tensor, Any], torch.Tensor]

# sizes a part is exported with; what is compiled holds for any others
_TOKENS, _SEQUENCES, _SLOTS, _POSITIONS = 3, 5, 7, 11
_T, _S, _C, _P = (Dim(name, min=2) for name in ("tokens", "sequences", "slots", "positions"))


@dataclass(slots=True)
class LayerCache:
    """One layer of a KV cache as the blocks read it, under the index 0."""

    latent: bool
    start: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_scales: list[torch.Tensor]
    value_scales: list[torch.Tensor]

    scales = KVCache.scales
    query_dtype = KVCache.query_dtype

    @staticmethod
    def of(cache: KVCache, layer: int) -> LayerCache:
        """Layer ``layer`` of a cache."""
        if cache.latent_rank is not None:
            # views are made here: inside a graph they would become copies
            rows, scale = cache.latents(layer)
            return LayerCache(True, cache.start, [rows], [], [] if scale is None else [scale], [])
        scales = [[] if scale is None else [scale] for scale in cache.scales(layer)]
        return LayerCache(False, cache.start, [cache.keys[layer]], [cache.values[layer]], *scales)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    def latents(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.keys[layer], self.key_scales[layer] if self.key_scales else None

    def tensors(self) -> list[torch.Tensor]:
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]

    def over(self, start: torch.Tensor, tensors: list[torch.Tensor]) -> LayerCache:
        """The same kind of cache over other tensors, in the order of :meth:`tensors`."""
        given = iter(tensors)
        lists = [[next(given) for _ in x] for x in (self.keys, self.values, self.key_scales, self.value_scales)]
        return LayerCache(self.latent, start, *lists)


@dataclass(frozen=True, slots=True)
class Place:
    """The kind of cache and rotary tables that a model's attention reads, shown by small ones."""

    cache: LayerCache
    tables: tuple[torch.Tensor, torch.Tensor]
    interleaved: bool

    @staticmethod
    def of(engine: Engine) -> Place:
        """That of an engine."""
        rope = engine.rope(_POSITIONS)
        cache = LayerCache.of(engine.new_cache(_SEQUENCES, _SLOTS), 0)
        return Place(cache, (rope.cos[:_POSITIONS], rope.sin[:_POSITIONS]), rope.interleaved)

    def example(self) -> tuple[list[torch.Tensor], list[dict[int, Any]]]:
        """A place as :func:`place_of` gives it, and which of its sizes are free."""
        rows = [torch.zeros(_TOKENS, dtype=torch.int32, device=self.cache.start.device) for _ in range(3)]
        cache = self.cache.tensors()
        slots = 1 if self.cache.latent else 2
        free = [*[{0: _T}] * 3, *[{0: _P}] * 2, {0: _S}, *[{0: _S, slots: _C}] * len(cache)]
        return [*rows, *self.tables, self.cache.start, *cache], free

    def context(self, place: list[torch.Tensor]) -> Any:
        """What a block reads, over these tensors."""
        position, seq, slot, cos, sin, start, *cache = place
        over: Any = self.cache.over(start, cache)
        return Context(Rows(position, seq, slot), over, Rope(cos, sin, self.interleaved), Workspace(recorded=True))

    def signature(self) -> Any:
        """All of it that decides what is compiled."""
        shapes = [[str(t.dtype), list(t.shape)] for t in (*self.cache.tensors(), *self.tables)]
        return [self.cache.latent, self.interleaved, shapes]


def place_of(ctx: Context, layer: int) -> list[torch.Tensor]:
    """What attention reads beside weights and residual stream: rows, rotary tables, and a layer of the cache."""
    rows, rope, cache = ctx.rows, ctx.rope, LayerCache.of(ctx.cache, layer)
    return [rows.position, rows.seq, rows.slot, rope.cos, rope.sin, cache.start, *cache.tensors()]


class Part(nn.Module):
    """One half of a decoder layer, or the final norm.

    Args:
        block: of the engine.
        run: ``run(block, h, ctx)``, gives the new residual stream.
        place: what else it reads; None for a part that reads no cache.
    """

    def __init__(self, block: Any, run: Run, place: Place | None) -> None:
        super().__init__()
        self.block, self.run, self.place = block, run, place

    def forward(self, h: torch.Tensor, tensors: list[torch.Tensor], place: list[torch.Tensor]) -> torch.Tensor:
        """``tensors``: of the block. ``place``: as :func:`place_of` gives it, or nothing."""
        ctx: Any = Context(None, None, None, Workspace(recorded=True))  # type: ignore[arg-type]
        if self.place is not None:
            ctx = self.place.context(place)
        return self.run(with_tensors(self.block, iter(tensors)), h, ctx)

    def signature(self) -> str:
        """All that decides what is compiled."""
        place = None if self.place is None else self.place.signature()
        return json.dumps([self.run.__module__, self.run.__qualname__, signature(self.block), place])

    def example(self, hidden_size: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments of :meth:`forward` to export it with, and which of their sizes are free."""
        tensors = tensors_of(self.block)
        place, free = ([], []) if self.place is None else self.place.example()
        h = torch.empty(_TOKENS, hidden_size, device=tensors[0].device)
        return (h, tensors, place), ({0: _T}, [None] * len(tensors), free)
