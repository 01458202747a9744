"""One decode step of a batch as a recorded program: token in, the greedy next token and logits out."""

from __future__ import annotations

import torch

from llmopt.ops.next_token import advance, next_token
from llmopt.runtime.blocks import Context, Workspace
from llmopt.runtime.cache import KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.program import Program
from llmopt.runtime.rows import Rows


class DecodeStep:
    """One token further in every sequence of a cache.

    Args:
        engine: the model.
        cache: of S sequences; it must not grow while the step is in use.
        greedy: logits are seldom asked for, so the head may be screened.

    Attributes:
        ids: ``[S]`` int64, the tokens to decode next. A run replaces them by the greedy choice.
        logits: ``[S, V]`` float32, of the last run; of a greedy step only after :meth:`complete`.
    """

    def __init__(self, engine: Engine, cache: KVCache, greedy: bool = False) -> None:
        batch = cache.sequences
        self.cache, self.capacity, self.threads = cache, cache.capacity, torch.get_num_threads()
        self.ids = torch.zeros(batch, dtype=torch.int64)
        self.logits = torch.empty(batch, engine.vocab_size)
        self.greedy = greedy
        self._engine, self._screened = engine, greedy and engine.screens(batch)
        self._rows = Rows(
            torch.zeros(batch, dtype=torch.int32), torch.arange(batch, dtype=torch.int32),
            torch.zeros(batch, dtype=torch.int32),
        )  # fmt: skip
        self._hidden = torch.empty(batch, engine.hidden_size)
        self._context = Context(self._rows, cache, engine.rope(cache.capacity), Workspace(recorded=True))
        self._program = Program(lambda: self._record(engine), keep=(self._context, engine, cache.keys, cache.values))

    def _record(self, engine: Engine) -> None:
        # the rows hold the last token's place; a step begins by moving on
        advance(self._rows.position, self._rows.slot)
        engine.embed(self.ids, self._hidden)
        engine.run_layers(self._hidden, self._context)
        if self._screened:
            engine.greedy(self._hidden, self.ids)
        else:
            engine.logits(self._hidden, self.logits)
            next_token(self.logits, self.ids)

    def complete(self) -> None:
        """Make sure that ``logits`` are those of the last run."""
        if self._screened:
            self._engine.logits(self._hidden, self.logits)

    def fits(self, cache: KVCache) -> bool:
        """True while what was recorded is what would be recorded now."""
        same = self.cache is cache and self.capacity == cache.capacity and len(self.ids) == cache.sequences
        return same and self.threads == torch.get_num_threads()

    def start(self, position: torch.Tensor) -> None:
        """Place the next token behind what the cache holds; ``position`` [S] is its rope position."""
        self._rows.slot.fill_(self.cache.length - 1)
        self._rows.position.copy_(position.to(torch.int32) - 1)

    def run(self) -> None:
        """Decode ``ids``. The caller has made sure that the cache has room."""
        self._program.run()
