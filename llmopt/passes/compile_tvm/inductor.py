"""The rival: the same decode step through ``torch.compile``, whole, by Inductor."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from llmopt.ops.next_token import next_token
from llmopt.passes.compile_tvm.engine import StepEngine
from llmopt.runtime.blocks import Context, Rope, Workspace
from llmopt.runtime.cache import KVCache
from llmopt.runtime.rows import Rows
from llmopt.runtime.step import DecodeStep

_COUNT = itertools.count()


class InductorEngine(StepEngine):
    """Decodes by functions that Inductor compiled, each for one number of sequences, tokens and threads, when first run."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._steps: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def program(self, step: DecodeStep) -> Any:
        cache = _apart(step.cache)
        for tensor, dim in [*((t, 2) for t in cache.tensors()), (step.rope.cos, 0), (step.rope.sin, 0)]:
            torch._dynamo.mark_dynamic(tensor, dim)
        # what guards would look at: the code has it compiled in
        kind = (
            len(step.ids), step.screened, step.sampling is None, torch.get_num_threads(), cache.sequences, cache.dtype,
            cache.head_dims, len(cache.key_scales), step.rope.cos.shape[1],
        )  # fmt: skip
        if kind not in self._steps:
            # the model's own tensors do not change while the engine stands: no guard need look at them in every step.
            # One thread compiles: a pool of processes would stay behind
            options: dict[str, Any] = {
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "compile_threads": 1,
            }  # fmt: skip
            self._steps[kind] = torch.compile(self._fresh_whole(), fullgraph=True, options=options)
        return _Calls(self._steps[kind], step, cache)

    def _fresh_whole(self) -> Callable[..., Any]:
        # torch keeps what it compiled with the code of a function, and without guards would take one engine's for another's
        function = type(self)._whole
        code = function.__code__.replace(co_name=f"_whole_{next(_COUNT)}")
        fresh = types.FunctionType(
            code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
        )
        return types.MethodType(fresh, self)

    def _whole(
        self, ids: torch.Tensor, position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, cos: torch.Tensor,
        sin: torch.Tensor, cache: Any, screened: bool, largest: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Hidden states, the next tokens, and logits where they are needed for those; ``ids`` where they are drawn later."""
        ctx = Context(Rows(position, seq, slot), cache, Rope(cos, sin, self._interleaved), Workspace(recorded=True))
        h = self.decode(ids, torch.empty(ids.shape[0], self.hidden_size), ctx)
        chosen = torch.empty_like(ids)
        if screened:
            self.greedy(h, chosen)
            return h, chosen, None
        logits = torch.empty(ids.shape[0], self.vocab_size)
        self.logits(h, logits)
        if not largest:
            return h, ids, logits
        next_token(logits, chosen)
        return h, chosen, logits


def _apart(cache: KVCache) -> KVCache:
    """The same memory, layer by layer: of tensors that are views of one block, torch compiles in where each begins."""
    apart = copy.copy(cache)
    for name in ("keys", "values", "key_scales", "value_scales"):
        setattr(apart, name, [from_dlpack(t) for t in getattr(cache, name)])
    return apart


class _Calls:
    """Runs a compiled step on the tensors of a :class:`DecodeStep`."""

    def __init__(self, function: Callable[..., Any], step: DecodeStep, cache: KVCache) -> None:
        self._function, self._step, self._cache = function, step, cache

    def run(self, times: int = 1) -> None:
        step = self._step
        for _ in range(times):
            step.rows.position += 1
            step.rows.slot += 1
            step.hidden, chosen, logits = self._function(
                step.ids, step.rows.position, step.rows.seq, step.rows.slot, step.rope.cos, step.rope.sin, self._cache,
                step.screened, step.sampling is None,
            )  # fmt: skip
            if logits is not None:
                step.logits.copy_(logits)
            if step.sampling is None:
                step.ids.copy_(chosen)
            else:
                step.choose_next()
