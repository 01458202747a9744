"""The decoder of one model as a sequence of our ops, in one place for prefill, decode and the model's own ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmopt.errors import UnsupportedModelError
from llmopt.models.base import ResolvedModel
from llmopt.ops.embed import embed
from llmopt.runtime.blocks import Context, GqaBlock, MlpBlock, Rope, Workspace
from llmopt.runtime.cache import KVCache
from llmopt.runtime.linear import linears
from llmopt.runtime.rows import Rows
from llmopt.runtime.weights import norm_of, weight_of

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

    Raises:
        UnsupportedModelError: a part that the ops do not know.
    """

    def __init__(self, resolved: ResolvedModel) -> None:
        reason = unsupported(resolved)
        if reason:
            raise UnsupportedModelError(reason)
        model, family, config = resolved.model, resolved.family, resolved.model.config
        parent, attr = resolved.parent_of_embedding()
        self.config, self.dtype = config, resolved.dtype
        self.table = weight_of(getattr(parent, attr), "embedding")
        self.layers = [(GqaBlock(layer, family, config), MlpBlock(layer, family)) for layer in resolved.layers]
        self.norm, self.eps = norm_of(resolved.final_norm)
        self.head = weight_of(getattr(resolved.head.parent, resolved.head.attr), resolved.head.name)
        self.hidden_size, self.vocab_size = self.table.cols, self.head.rows
        self._rotary: Any = model.get_submodule(family.rotary)
        self._interleaved = family.attention.rope_style(config) == "interleaved"
        self._rope: Rope | None = None

    def new_cache(self, sequences: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for this model."""
        first = self.layers[0][0]
        return KVCache(
            sequences, len(self.layers), first.kv_heads, (first.head_dim, first.head_dim), capacity, dtype or self.dtype
        )  # fmt: skip

    def rope(self, positions: int) -> Rope:
        """Tables of at least this many positions."""
        if self._rope is None or len(self._rope.cos) < positions:
            rows = -(-positions // _ROPE_ROWS) * _ROPE_ROWS
            like = torch.empty(1, 1, 1)
            cos, sin = self._rotary(like, torch.arange(rows)[None])
            half = cos.shape[-1] // 2
            self._rope = Rope(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous(), self._interleaved)
        return self._rope

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
        for part, some in rows.chunks(size):
            self.run_layers(h[part], Context(some, cache, rope, Workspace()), on_layer)
        return h

    def logits(self, h: torch.Tensor, out: torch.Tensor) -> None:
        """``out[T, V] = head(norm(h))``, float32."""
        linears(h, (self.head,), out, norm=self.norm, eps=self.eps)


def unsupported(resolved: ResolvedModel) -> str:
    """Why the engine cannot run this model, or ''."""
    config: Any = resolved.model.config
    if resolved.family.attention.kind != "gqa":
        return "latent attention (MLA) has no fused block"
    if any(layer.experts is not None for layer in resolved.layers):
        return "mixtures of experts have no fused block"
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
