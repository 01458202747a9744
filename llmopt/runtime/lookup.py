"""Prompt-lookup speculation: what followed the last n-gram before is guessed to follow again, and verified in one step.

The idea is Saxena's (prompt lookup decoding, 2023). Whether guesses are verified, and how many, follows from two running
measures: how often guesses turn out right, and what a step of several tokens costs beside a step of one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmopt.runtime.engine import Engine
from llmopt.runtime.step import DecodeStep

# tokens of one step: sizes that the products have blocks for
STEP_TOKENS = (2, 4, 6, 8, 12, 16)
MOST_GUESSES = STEP_TOKENS[-1] - 1

# steps run while speculating, guesses verified in them, and guesses that turned out right: each spared a step
COUNTS = ("steps", "guesses", "right")

_FORGET = 1 / 16  # weight of the newest guess in the share of right ones
_SMOOTH = 1 / 8  # weight of the newest step in its time
_REFRESH = 32  # one step in so many is plain, so that the time of a plain step stays known


@dataclass(frozen=True, slots=True)
class Lookup:
    """What is asked for: ``guesses`` tokens at most, found by n-grams of ``ngram`` tokens down to one."""

    guesses: int
    ngram: int = 3


class NgramIndex:
    """Where each n-gram of a growing sequence was last followed by something.

    Args:
        tokens: the sequence so far.
        longest: n-grams of 1 to so many tokens are kept.
    """

    def __init__(self, tokens: Sequence[int], longest: int) -> None:
        self._tokens: list[int] = []
        self._next: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One token further."""
        tokens, end = self._tokens, len(self._tokens)
        for n, places in enumerate(self._next[:end], 1):
            places[tuple(tokens[end - n :])] = end
        tokens.append(token)

    def following(self, count: int) -> tuple[int, list[int]]:
        """The length of the longest n-gram at the end that was there before, and ``count`` tokens that followed it.

        What followed may reach the end of the sequence; it then goes on with itself, as in a text that repeats. Without a
        match the length is 0, and nothing follows.
        """
        tokens, end = self._tokens, len(self._tokens)
        for n in range(min(len(self._next), end), 0, -1):
            place = self._next[n - 1].get(tuple(tokens[end - n :]))
            if place is not None:
                period = end - place
                return n, [tokens[place + i % period] for i in range(count)]
        return 0, []


class Gain:
    """The running measures, and what follows from them.

    Args:
        longest: longest n-gram.
    """

    def __init__(self, longest: int) -> None:
        # at first little is expected, and soon known: the newest guess has a weight of a half, a third, ... down to _FORGET
        self._right = [0.3] * (longest + 1)
        self._seen = [1] * (longest + 1)
        self._plain: float | None = None
        self._slope = 0.1  # cost of a further token in a step, of a step of one: an optimistic start
        self._since_plain = 0

    def guessed(self, ngram: int, right: bool) -> None:
        """A token guessed by an n-gram of this length has come, or another one has."""
        self._seen[ngram] += 1
        self._right[ngram] += max(_FORGET, 1 / self._seen[ngram]) * (right - self._right[ngram])

    def took(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has run."""
        if tokens == 1:
            self._since_plain = 0
            # a step that was interrupted counts double at most
            before = seconds if self._plain is None else self._plain
            self._plain = before + _SMOOTH * (min(seconds, 2 * before) - before)
        elif self._plain is not None:
            self._since_plain += 1
            slope = max(0.0, (seconds / self._plain - 1) / (tokens - 1))
            self._slope += _SMOOTH * (min(slope, 2 * self._slope + 0.1) - self._slope)

    def worth(self, ngram: int, most: int) -> int:
        """How many guesses, up to ``most``, to verify in the next step; 0: none."""
        if self._plain is None or self._since_plain >= _REFRESH:
            return 0
        share, best, found = self._right[ngram], 1.0, 0
        for tokens in STEP_TOKENS:
            if tokens > most + 1:
                break
            expected = sum(share**i for i in range(tokens))
            if expected / (1 + self._slope * (tokens - 1)) > best:
                best, found = expected / (1 + self._slope * (tokens - 1)), tokens - 1
        return found


class Speculation:
    """Decodes one sequence a token a call; a call whose token was guessed and verified before needs no step.

    Args:
        engine: the model.
        step: the recorded step of one token, on the sequence's cache.
        lookup: what is asked for.
        tokens: the sequence so far, without the token to decode next.
        counts: is added to; see :data:`COUNTS`.
    """

    def __init__(
        self, engine: Engine, step: DecodeStep, lookup: Lookup, tokens: Sequence[int], counts: dict[str, int]
    ) -> None:
        self.step = step
        self._engine, self._lookup, self._counts = engine, lookup, counts
        self._index = NgramIndex(tokens, lookup.ngram)
        self._gain = Gain(lookup.ngram)
        self._ngram = 0  # length of the n-gram that the guesses come from
        self._guesses: list[int] = []  # the tokens expected next
        self._verified: DecodeStep | None = None  # the step that has decoded them, if one has
        self.last = step  # the step that the last logits are of
        self._in_place = True  # the step of one token stands where the next token goes

    def decode(self, token: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows a token that stands behind what the cache holds.

        Args:
            token: ``[1]`` int64, the next one of the sequence.
            room: tokens that may be guessed beyond it.

        Returns:
            Logits ``[1, V]`` (those of a greedy step are to be completed first) and the greedy choice ``[1]``; both are
            valid until the next call.
        """
        value = int(token)
        self._index.append(value)
        step = self._verified if self._came(value) else None
        if step is None:
            step = self._run(token, room)
        self.last = step
        if step is self.step:
            return step.logits, step.ids
        row = len(self._guesses)  # the last token is the first row
        return step.logits[row : row + 1], step.ids[row : row + 1]

    def moved_to(self, step: DecodeStep) -> None:
        """The cache has grown, and this is its step from now on."""
        self.step, self._guesses, self._verified, self._in_place = step, [], None, True

    def _came(self, token: int) -> bool:
        """True when the token is the one that was expected."""
        if not self._guesses:
            return False
        right = self._guesses.pop(0) == token
        self._gain.guessed(self._ngram, right)
        self._counts["right"] += right and self._verified is not None
        return right

    def _run(self, token: torch.Tensor, room: int) -> DecodeStep:
        self._ngram, guesses = self._index.following(min(room, self._lookup.guesses))
        worth = self._gain.worth(self._ngram, len(guesses)) if guesses else 0
        step = self._wider(worth + 1) if worth else self.step
        # a guess that is not verified is watched all the same: it tells whether the next ones are worth it
        self._guesses, self._verified = guesses[: max(worth, 1)], step if worth else None
        if worth or not self._in_place:
            step.start(step.cache.length - step.cache.start)
            self._in_place = not worth
        if worth:
            step.ids.copy_(torch.tensor([*guesses[worth - 1 :: -1], int(token)]))
        elif token is not step.ids:
            step.ids.copy_(token)
        _settle(step)
        began = time.perf_counter()
        step.run()
        _settle(step)
        self._gain.took(worth + 1, time.perf_counter() - began)
        self._counts["steps"] += 1
        self._counts["guesses"] += worth
        return step

    def _wider(self, tokens: int) -> DecodeStep:
        """The step of several tokens; it is recorded when first needed, and kept with that of one."""
        steps = self.step.wider
        if tokens not in steps:
            steps[tokens] = DecodeStep(self._engine, self.step.cache, tokens, self.step.greedy)
        elif steps[tokens].greedy != self.step.greedy:
            steps[tokens].choose_by(greedy=self.step.greedy)
        return steps[tokens]


def _settle(step: DecodeStep) -> None:
    """Wait for a GPU: a step is timed, not its launch."""
    if step.ids.is_cuda:
        torch.cuda.synchronize(step.ids.device)
