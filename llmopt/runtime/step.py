"""One decode step as a recorded program: token in, logits and the next token out, the largest or one that is drawn.

A step takes one token of each sequence of a batch, or several of a single sequence (to verify tokens that were guessed).
"""

from __future__ import annotations

import torch

from llmopt.errors import InputError
from llmopt.ops.next_token import advance, next_token
from llmopt.runtime.blocks import Context, Workspace
from llmopt.runtime.cache import KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.program import Program, Recorded
from llmopt.runtime.rows import Rows
from llmopt.runtime.sampling import Sampling, Settings


class DecodeStep:
    """One token further in every sequence of a cache, or several tokens further in its only one.

    Args:
        engine: the model.
        cache: of S sequences; it must not grow while the step is in use.
        tokens: M, of each sequence; more than one only where S is one.
        greedy, settings: as of :meth:`choose_by`.

    Attributes:
        ids: ``[S * M]`` int64, the tokens to decode next, the last one first. A run replaces each by what it has chosen to
            follow it.
        logits: ``[S * M, V]`` float32, of the last run, in the same order; of a greedy step only after :meth:`complete`.
        hidden: ``[S * M, H]`` float32 of the last run, as the engine's ``decode`` gives them.
        sampling: what tokens are drawn with now; None: the largest logit is taken.
        screened: the head is screened now.
        wider: steps of more tokens over the same cache, by M; whoever needs one makes it.
    """

    def __init__(
        self, engine: Engine, cache: KVCache, tokens: int = 1, greedy: bool = False, settings: Settings | None = None
    ) -> None:
        rows, device = cache.sequences * tokens, engine.device
        self.cache, self.capacity, self.threads = cache, cache.capacity, torch.get_num_threads()
        self.tokens, self.wider = tokens, dict[int, DecodeStep]()
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits = torch.empty(rows, engine.vocab_size, device=device)
        self._engine = engine
        # the last token first: attention takes tokens that follow each other for one run, and cuts that run's keys in
        # another way than a single token's. So each is a run of its own, with the numbers it has when decoded alone.
        self._ahead = torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device=device).repeat(cache.sequences)
        self.rows = Rows(
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.arange(cache.sequences, dtype=torch.int32, device=device).repeat_interleave(tokens),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )
        self.rope = engine.rope(cache.capacity)
        self.hidden = self._embedded = torch.empty(rows, engine.hidden_size, device=device)
        # what programs that draw have recorded, kept for the next call that does
        self._sampling: Sampling | None = None
        # by how the token is chosen, each recorded when first needed; with its hidden states
        self._programs = dict[tuple[bool, bool], tuple[Recorded, torch.Tensor]]()
        self.choose_by(greedy=greedy, settings=settings)

    def choose_by(self, *, greedy: bool = False, settings: Settings | None = None) -> None:
        """How runs choose tokens from now on: the largest logit, or, with ``settings``, one that is drawn.

        Args:
            greedy: logits are seldom asked for, so the head may be screened.
            settings: of the draw.
        """
        self.greedy, self.sampling = greedy, None
        self.screened = greedy and settings is None and self._engine.screens(len(self.ids))
        if settings is not None:
            if self._sampling is None:
                self._sampling = Sampling(len(self.ids), self._engine.vocab_size, self.ids.device)
            self.sampling = self._sampling
            self.sampling.use(settings)
        kind = self.sampling is not None, self.screened
        if kind not in self._programs:
            program = self._engine.program(self)
            self._programs[kind] = program, self.hidden
        self._program, self.hidden = self._programs[kind]

    @property
    def chosen(self) -> torch.Tensor:
        """``[S * M]`` int64, what the last run has chosen; -1 where nothing could be drawn."""
        return self.ids if self.sampling is None else self.sampling.chosen

    def make_calls(self) -> object:
        """The op calls that a step consists of; what must be kept as long as they are."""
        engine = self._engine
        context = Context(self.rows, self.cache, self.rope, Workspace(engine.device, recorded=True))
        # the rows hold the last token's place; a step begins by moving on
        advance(self.rows.position, self.rows.slot)
        self.hidden = engine.decode(self.ids, self._embedded, context)
        if self.screened:
            engine.greedy(self.hidden, self.ids)
        else:
            engine.logits(self.hidden, self.logits)
            self.choose_next()
        return context, self.cache.tensors(), self.cache.start

    def choose_next(self) -> None:
        """Tokens from the logits: the end of a step whose head is not screened."""
        if self.sampling is None:
            next_token(self.logits, self.ids)
        else:
            self.sampling.choose(self.logits, self.ids)

    def complete(self) -> None:
        """Make sure that ``logits`` are those of the last run."""
        if self.screened:
            self._engine.logits(self.hidden, self.logits)

    def fits(self, cache: KVCache, engine: Engine) -> bool:
        """True while what was recorded is what would be recorded now, of these modules."""
        same = (
            self._engine is engine and self.cache is cache and self.capacity == cache.capacity
            and len(self.ids) == cache.sequences * self.tokens
        )  # fmt: skip
        # tensors that were made in inference mode may not be written to outside of it
        usable = torch.is_inference_mode_enabled() or not self.ids.is_inference()
        return same and usable and self.threads == torch.get_num_threads()

    def start(self, position: torch.Tensor) -> None:
        """Place the next tokens behind what the cache holds; ``position`` [S] is the rope position of the first.

        Runs of a step of one token follow each other; with more, each run is placed anew.
        """
        torch.add(self._ahead, self.cache.length - 1, out=self.rows.slot)
        torch.add(self._ahead, position.to(torch.int32) - 1, out=self.rows.position)

    def to_last_slots(self) -> None:
        """Stand where a run writes to the last slots of the cache: for runs whose tokens nobody wants."""
        torch.add(self._ahead, self.capacity - 1 - self.tokens, out=self.rows.slot)  # a run moves on first
        self.rows.position.copy_(self.rows.slot)

    def run(self) -> None:
        """Decode ``ids``. The caller has made sure that the cache has room."""
        if self.sampling is not None:
            self.sampling.renew()
        self._program.run()

    def profile(self, times: int) -> list[tuple[str, float]]:
        """Decode ``times`` tokens more, for which the cache has room: calls and seconds, as :meth:`.Program.profile`.

        Raises:
            InputError: the step is not a recorded program of ops.
        """
        if not isinstance(self._program, Program):
            raise InputError.argument("profile", expected="a program of ops", got=type(self._program).__name__)
        return self._program.profile(times)
