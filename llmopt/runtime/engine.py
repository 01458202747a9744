"""The decoder of one model as a sequence of our ops, in one place for prefill, decode and the model's own ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmopt.errors import UnsupportedModelError
from llmopt.models.base import ModelFamily, ResolvedLayer, ResolvedModel
from llmopt.ops.device import by_triton
from llmopt.ops.embed import embed
from llmopt.ops.screened_head import screened_head
from llmopt.runtime import screen
from llmopt.runtime.blocks import Context, GqaBlock, MlpBlock, Rope, Workspace
from llmopt.runtime.cache import KVCache
from llmopt.runtime.latent import LatentBlock
from llmopt.runtime.linear import linears
from llmopt.runtime.masks import rope_positions, visible_tokens
from llmopt.runtime.moe import MoeBlock
from llmopt.runtime.pools import GraphMemory, pool_of_its_own
from llmopt.runtime.program import Recorded, recorded
from llmopt.runtime.rows import Rows
from llmopt.runtime.weights import norm_of, weight_of

if TYPE_CHECKING:
    from llmopt.runtime.step import DecodeStep

# tokens that go through the layers together: enough for the products to be bound by arithmetic, few enough for what lies
# between them to stay in the caches
CHUNK_TOKENS = 512
# kinds of rotary embedding whose angles do not depend on the length of the sequence
_STATIC_ROPE = ("default", "linear", "yarn", "llama3")
_ROPE_ROWS = 4096

LayerHook = Callable[[int, torch.Tensor], None]


class Engine:
    """Runs the decoder layers, the final norm and the head of a model.

    Args:
        resolved: the model; its modules are read as they are now.
        screened: choose greedy tokens by a screened head, where it can be screened; None: where that pays.
        kv_dtype: of the caches it makes, int8 among them; None: the model's.
        pooled: memory that a call needs is kept for the next (:mod:`llmopt.passes.pool_memory`); on a GPU decode steps run as
            CUDA graphs, in memory that they share.

    Raises:
        UnsupportedModelError: a part that the ops do not know.
    """

    def __init__(
        self, resolved: ResolvedModel, screened: bool | None = None, kv_dtype: torch.dtype | None = None,
        pooled: bool = False,
    ) -> None:  # fmt: skip
        reason = unsupported(resolved)
        if reason:
            raise UnsupportedModelError(reason)
        model, family, config = resolved.model, resolved.family, resolved.model.config
        parent, attr = resolved.parent_of_embedding()
        self.config, self.kv_dtype, self.device = config, kv_dtype or resolved.dtype, resolved.device
        self.table = weight_of(getattr(parent, attr), "embedding")
        self.layers = [_blocks(layer, family, config) for layer in resolved.layers]
        self.norm, self.eps = norm_of(resolved.final_norm)
        self.head = weight_of(getattr(resolved.head.parent, resolved.head.attr), resolved.head.name)
        self.hidden_size, self.vocab_size = self.table.cols, self.head.rows
        wanted = screen.pays(self.head) if screened is None else screened
        self.screened = wanted and not screen.unfit(self.head) and not by_triton(self.head.data)
        self._rotary: Any = model.get_submodule(family.rotary)
        self._interleaved = family.attention.rope_style(config) == "interleaved"
        self._own_halves = family.attention.rotated_as_halves
        self._rope: Rope | None = None
        self.pooled = pooled
        self._graphs = GraphMemory()
        self._idle_work: list[Workspace] = []

    def new_cache(self, sequences: int, capacity: int) -> KVCache:
        """An empty cache for this model."""
        with pool_of_its_own(self.device) if self.pooled else nullcontext():
            return KVCache(sequences, capacity=capacity, **self.cache_options())

    def cache_options(self) -> dict[str, Any]:
        """What every cache of this model is made with."""
        first = self.layers[0][0]
        if isinstance(first, LatentBlock):
            kv_heads, dims, rank = 1, (first.row_size, 0), first.rank
        else:
            kv_heads, dims, rank = first.kv_heads, (first.head_dim, first.head_dim), None
        return {
            "layers": len(self.layers), "kv_heads": kv_heads, "head_dims": dims, "dtype": self.kv_dtype, "latent_rank": rank,
            "own_halves": self._interleaved and self._own_halves, "device": self.device,
        }  # fmt: skip

    def stand_ins(self) -> list[tuple[nn.Module, int]]:
        """Modules that a decode step does not read, each with the bytes it reads in their place."""
        return [attention.stand_in() for attention, _ in self.layers if isinstance(attention, LatentBlock)]

    def rope(self, positions: int) -> Rope:
        """Tables of at least this many positions."""
        rope = self._rope
        if rope is None or len(rope.cos) < positions:
            rows = -(-positions // _ROPE_ROWS) * _ROPE_ROWS
            like = torch.empty(1, 1, 1, device=self.device)
            angles = self._rotary(like, torch.arange(rows, device=self.device)[None])
            # each angle twice, or once as a complex number
            cos, sin = (angles.real, angles.imag) if isinstance(angles, torch.Tensor) else (_half(x) for x in angles)
            rope = Rope(cos[0].float().contiguous(), sin[0].float().contiguous(), self._interleaved)
            self._rope = rope  # not read again: another thread may have put a shorter one there
        return rope

    def embed(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """``out[T, H] = table[ids]``."""
        embed(ids, self.table, out)

    def run_layers(self, h: torch.Tensor, ctx: Context, on_layer: LayerHook | None = None) -> None:
        """All layers on ``h`` [T, H] float32, in place. ``on_layer(index, h)`` is called after each."""
        for index, (attention, mlp) in enumerate(self.layers):
            attention.run(h, ctx)
            mlp.run(h, ctx)
            if on_layer is not None:
                on_layer(index, h)

    def hidden(
        self, h: torch.Tensor, rows: Rows, cache: KVCache, positions: int, on_layer: LayerHook | None = None
    ) -> torch.Tensor:
        """Final hidden states, before the last norm, of embedded tokens; in place, chunk by chunk.

        Args:
            h: ``[T, H]`` float32 embeddings.
            rows: their places; the cache has room for them.
            cache: read and written.
            positions: one more than the largest rope position.
            on_layer: called after each layer; the tokens then go through it all at once.
        """
        rope = self.rope(positions)
        size = CHUNK_TOKENS if on_layer is None else max(1, len(rows))
        # callers in several threads: each has buffers of its own
        try:
            work = self._idle_work.pop()
        except IndexError:
            work = Workspace(self.device)
        for part, some in rows.chunks(size):
            self.run_layers(h[part], Context(some, cache, rope, work), on_layer)
        if self.pooled and on_layer is None and not torch.is_inference_mode_enabled():
            self._idle_work.append(work)
        return h

    def decode(self, ids: torch.Tensor, h: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Embedding and all layers of one decode step, as calls that are recorded.

        Args:
            ids: ``[T]`` int64.
            h: ``[T, H]`` float32, written.
            ctx: rows, cache and workspace of the step.

        Returns:
            What :meth:`logits` and :meth:`greedy` take: hidden states ``[T, H]`` before the final norm.
        """
        self.embed(ids, h)
        self.run_layers(h, ctx)
        return h

    def program(self, step: DecodeStep) -> Recorded:
        """What runs a step again and again: its calls, recorded."""
        return recorded(step, self._graphs if self.pooled else None)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """Run the tokens the cache does not hold yet.

        Args:
            ids: ``[B, tokens]`` int64, those in the cache among them.
            mask: ``[B, tokens]``, 0 for padding on the left, or None.
            cache: of B sequences; it grows where it must.

        Returns:
            Logits ``[B, V]`` float32 of the last token of each sequence.
        """
        past, (batch, length) = cache.length, ids.shape
        new, keep = ids[:, past:], self._make_room(ids, mask, cache, own_layers=False)
        rows = Rows.of_batch(
            batch, length - past, past, rope_positions(mask, ids.shape, ids.device)[:, past:], keep, self.device
        )
        h = torch.empty(len(rows), self.hidden_size, device=self.device)
        self.embed((new.reshape(-1) if keep is None else new[keep]).contiguous(), h)
        self.hidden(h, rows, cache, length)
        cache.length = length
        counts = torch.full((batch,), length - past, device=self.device) if keep is None else keep.sum(-1)
        logits = torch.empty(batch, self.vocab_size, device=self.device)
        self.logits(h[counts.cumsum(0) - 1], logits)
        return logits

    @staticmethod
    def _make_room(
        ids: torch.Tensor, mask: torch.Tensor | None, cache: KVCache, *, own_layers: bool
    ) -> torch.Tensor | None:
        """A cache with room for the tokens it does not hold yet; which of them are no padding (None: all)."""
        _, keep = visible_tokens(mask, ids.shape[1] - cache.length, cache)
        cache.order_for(own_layers=own_layers)
        cache.reserve(ids.shape[1] + 1)
        cache.start_after(keep)
        return keep

    def logits(self, h: torch.Tensor, out: torch.Tensor) -> None:
        """``out[T, V] = head(norm(h))``, float32."""
        linears(h, (self.head,), out, norm=self.norm, eps=self.eps)

    def screens(self, tokens: int) -> bool:
        """True where so many greedy tokens are better had without their logits."""
        return self.screened and tokens <= screen.MOST_SEQUENCES

    def greedy(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        """``ids[T] = argmax(head(norm(h)))`` by the screened head."""
        screened_head(h, self.head, ids, norm=self.norm, eps=self.eps)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x[..., : x.shape[-1] // 2]


def _blocks(
    layer: ResolvedLayer, family: ModelFamily, config: Any
) -> tuple[GqaBlock | LatentBlock, MlpBlock | MoeBlock]:  # fmt: skip
    latent = family.attention.kind == "mla"
    attention = LatentBlock(layer, family, config) if latent else GqaBlock(layer, family, config)
    mlp = MoeBlock(layer, family, config) if layer.experts is not None else MlpBlock(layer, family)
    return attention, mlp


def unsupported(resolved: ResolvedModel) -> str:
    """Why the engine cannot run this model, or ''."""
    config: Any = resolved.model.config
    rotary: Any = resolved.model.get_submodule(resolved.family.rotary)
    kind = getattr(rotary, "rope_type", "default")
    if kind not in _STATIC_ROPE:
        return f"rope of type '{kind}' depends on the length of the sequence"
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"}:
        return "sliding-window attention"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"activation '{config.hidden_act}'"
    return ""
