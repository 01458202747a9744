"""The rival: the same decode step through ``torch.compile``, whole, by Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmopt.ops.next_token import next_token
from llmopt.passes.compile_tvm.engine import StepEngine
from llmopt.runtime.blocks import Context, Rope, Workspace
from llmopt.runtime.rows import Rows
from llmopt.runtime.step import DecodeStep


class InductorEngine(StepEngine):
    """Decodes by a function that Inductor compiled, one a number of tokens."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._steps: dict[int, Callable[..., Any]] = {}

    def program(self, step: DecodeStep) -> Any:
        tokens = len(step.ids)
        if tokens not in self._steps:
            # the model's own tensors do not change while the engine stands: no guard need look at them in every step
            options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
            self._steps[tokens] = torch.compile(self._whole, fullgraph=True, options=options)
        return _Calls(self._steps[tokens], step)

    def _whole(
        self, ids: torch.Tensor, position: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, cos: torch.Tensor,
        sin: torch.Tensor, cache: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ctx = Context(Rows(position, seq, slot), cache, Rope(cos, sin, self._interleaved), Workspace(recorded=True))
        h = torch.empty(ids.shape[0], self.hidden_size)
        h = self.decode(ids, h, ctx)
        logits = torch.empty(ids.shape[0], self.vocab_size)
        self.logits(h, logits)
        chosen = torch.empty_like(ids)
        next_token(logits, chosen)
        return logits, chosen


class _Calls:
    """Runs a compiled step on the tensors of a :class:`DecodeStep`."""

    def __init__(self, function: Callable[..., Any], step: DecodeStep) -> None:
        self._function, self._step = function, step

    def run(self, times: int = 1) -> None:
        step = self._step
        for _ in range(times):
            step.rows.position += 1
            step.rows.slot += 1
            logits, chosen = self._function(
                step.ids, step.rows.position, step.rows.seq, step.rows.slot, step.rope.cos, step.rope.sin, step.cache
            )
            step.logits.copy_(logits)
            step.ids.copy_(chosen)
