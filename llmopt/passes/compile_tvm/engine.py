"""The engine whose decode step is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from llmopt.models.base import ResolvedModel
from llmopt.passes.compile_tvm import plain
from llmopt.passes.compile_tvm.compiled import Machine, as_argument
from llmopt.passes.compile_tvm.part import Part, Place, place_of
from llmopt.passes.compile_tvm.tensors import tensors_of
from llmopt.runtime.blocks import Context
from llmopt.runtime.cache import CACHE, KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.latent import LatentBlock
from llmopt.runtime.masks import rope_positions
from llmopt.runtime.pools import GraphMemory

# generated kernels read whole vectors of this size
_ALIGNMENT = 64


class StepEngine(Engine):
    """Whose decode step is to be compiled: fused ops, or plain operations around heavy ones. Prefill is not.

    Without fuse_kernels ``decode`` includes the final norm, and ``logits`` takes what it gives.

    Args:
        resolved: the model.
        fused: the engine of fuse_kernels, whose ops are called; None: plain operations, and the model's own prefill.
    """

    def __init__(self, resolved: ResolvedModel, fused: Engine | None) -> None:
        screened, kv_dtype, pooled = (fused.screened, fused.kv_dtype, fused.pooled) if fused else (False, None, False)
        # on a GPU always a graph: otherwise the virtual machine would be asked for every token
        super().__init__(resolved, screened, kv_dtype, pooled or resolved.device.type == "cuda")
        self.fused = fused is not None
        self._model: Any = resolved.model
        self.run = _fused if self.fused else plain.run
        self.halves = [half for layer in self.layers for half in layer]
        for half in self.halves:
            if isinstance(half, LatentBlock):
                half.halves()  # made now, from weights that are there now

    def identity(self) -> tuple[Any, ...]:
        """Alike for engines of one kind over the same tensors."""
        found = tensors_of([self.halves, self.norm, self.head, self.table])
        options = (type(self), self.fused, self.screened, self.kv_dtype, self.pooled)
        return (*options, *((t.data_ptr(), t.shape, t.dtype) for t in found))

    def decode(self, ids: torch.Tensor, h: torch.Tensor, ctx: Context) -> torch.Tensor:
        self.embed(ids, h)
        for half in self.halves:
            h = self.run(half, h, ctx)
        return h if self.fused else plain.final_norm((self.norm, self.eps), h, ctx)

    def logits(self, h: torch.Tensor, out: torch.Tensor) -> None:
        if self.fused:
            super().logits(h, out)
        else:
            plain.head(h, self.head, out)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        if self.fused:
            return super().prefill(ids, mask, cache)
        past = cache.length
        self._make_room(ids, mask, cache, own_layers=True)
        positions = rope_positions(mask, ids.shape, ids.device)[:, past:]
        logits: torch.Tensor = self._model(
            input_ids=ids[:, past:], attention_mask=mask, position_ids=positions, use_cache=True,
            logits_to_keep=1, **{CACHE: cache},
        ).logits  # fmt: skip
        cache.order_for(own_layers=False)
        return logits[:, -1].float()


class TvmEngine(StepEngine):
    """Decodes by parts that TVM compiled.

    Attributes:
        kinds: the parts to compile, one of each kind, by signature.
        tensors: of each part, as TVM takes them.
        machine: what calls them; set before the first step.
    """

    def __init__(self, resolved: ResolvedModel, fused: Engine | None) -> None:
        super().__init__(resolved, fused)
        place = Place.of(self)
        parts = [Part(half, self.run, place if i % 2 == 0 else None) for i, half in enumerate(self.halves)]
        if not self.fused:
            parts.append(Part((self.norm, self.eps), plain.final_norm, None))
        self.kinds: dict[str, Part] = {}
        self._names: list[str] = []
        for part in parts:
            signature = part.signature()
            self.kinds.setdefault(signature, part)
            self._names.append(f"part_{list(self.kinds).index(signature)}")
        given = [[_aligned(t) for t in tensors_of(part.block)] for part in parts]
        self.tensors = [[as_argument(t) for t in tensors] for tensors in given]
        self._addresses = [{t.data_ptr() for t in tensors} for tensors in given]
        self.machine: Machine | None = None
        self._graphs = GraphMemory(others_allocate=True)

    def decode(self, ids: torch.Tensor, h: torch.Tensor, ctx: Context) -> torch.Tensor:
        assert self.machine is not None
        self.embed(ids, h)
        with self.machine.asked() as recording:
            stream = as_argument(h)
            for i, (name, tensors) in enumerate(zip(self._names, self.tensors, strict=True)):
                attention = i % 2 == 0 and i < len(self.halves)
                place = place_of(ctx, i // 2) if attention else []
                recording.begin(name, {h.data_ptr(), *self._addresses[i], *(t.data_ptr() for t in place)})
                stream = self.machine.call(name, stream, *tensors, *(as_argument(t) for t in place))
            out: torch.Tensor = from_dlpack(stream)
            for tensor in (*recording.kept(), stream):
                ctx.work.keep(tensor)
        return out


def _fused(half: Any, h: torch.Tensor, ctx: Context) -> torch.Tensor:
    half.run(h, ctx)
    return h


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A norm's weight at an address that generated kernels may read vectors from: a copy where it is not."""
    small = tensor.dim() == 1 and tensor.dtype == torch.float32
    return tensor.clone() if small and tensor.data_ptr() % _ALIGNMENT else tensor
