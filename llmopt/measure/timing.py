"""Times the stages of a model against each other, through ``generate``, in interleaved rounds.

Every round runs every stage once on the same prompt, in an order that rotates from round to round. TTFT is the time from
the call to the first token, TPOT the median time between the tokens after it: what a user of ``generate`` sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmopt.measure import stats
from llmopt.measure.report import Gain, Interval, Timing

# a request as users send them: verdicts weigh prefill and decode by it
REQUEST_TOKENS = 128
_PLAIN_ROUNDS, _PLAIN_RATIO = 4, 1.25


class Clock:
    """A streamer that only looks at the clock: ``generate`` calls ``put`` with the prompt, then with every token."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        return None


@dataclass(slots=True)
class Samples:
    """Raw times of one stage, one value a round."""

    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    def timing(self, prompt_tokens: int, decode_tokens: int) -> Timing:
        return Timing(stats.interval(self.prefill_ms), stats.interval(self.decode_ms), prompt_tokens, decode_tokens)

    def request_ms(self, tokens: int) -> list[float]:
        """Time of one request, round by round: the prompt and ``tokens`` generated tokens."""
        return [p + tokens * d for p, d in zip(self.prefill_ms, self.decode_ms, strict=True)]


def gain(old: Samples, new: Samples) -> Gain:
    return Gain(stats.ratio(old.prefill_ms, new.prefill_ms), stats.ratio(old.decode_ms, new.decode_ms))


def request_ratio(old: Samples, new: Samples, tokens: int) -> Interval:
    """Ratio of whole requests, old / new."""
    return stats.ratio(old.request_ms(tokens), new.request_ms(tokens))


def is_plain(old: Samples, new: Samples, tokens: int) -> bool:
    """True when every round so far, and four at least, says the same: one stage is faster than the other by a quarter.

    Far beyond what noise does to a pair within one round, so that looking early does not bias the verdict.
    """
    ratios = [a / b for a, b in zip(old.request_ms(tokens), new.request_ms(tokens), strict=True)]
    return len(ratios) >= _PLAIN_ROUNDS and (min(ratios) > _PLAIN_RATIO or max(ratios) < 1 / _PLAIN_RATIO)


@torch.no_grad()
def run_once(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """One ``generate`` call. Returns ``(ttft_ms, tpot_ms)``; TPOT is the median over the tokens after the first.

    Args:
        model: a causal LM in eval mode.
        prompt: ``[1, T]`` int64.
        new_tokens: at least 2.
    """
    clock = Clock()
    started = time.perf_counter()
    request(model, prompt, new_tokens, clock)
    stamps = torch.tensor(clock.stamps[1:], dtype=torch.float64) - started
    gaps = stamps[1:] - stamps[:-1]
    return float(stamps[0]) * 1e3, float(gaps.median()) * 1e3


def request(model: Any, prompt: torch.Tensor, new_tokens: int, clock: Clock) -> None:
    """``generate`` exactly so many tokens greedily, whatever the model's own generation config says."""
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, num_beams=1, num_return_sequences=1, streamer=clock, pad_token_id=0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    prompt_tokens: int = 128
    decode_tokens: int = 16
    min_rounds: int = 6
    max_rounds: int = 20
    budget_s: float = 60.0


def interleaved(
    stages: Mapping[str, Callable[[], Any]],
    prompt: torch.Tensor,
    plan: Plan,
    *,
    every_round: Callable[[], object] | None = None,
    on_round: Callable[[int, int], None] | None = None,
    enough: Callable[[dict[str, Samples]], bool] | None = None,
) -> dict[str, Samples]:
    """Run rounds of all stages until the budget is spent.

    Args:
        stages: name -> function that brings the model into that stage and returns it.
        prompt: ``[1, T]`` int64, the same for all.
        plan: tokens, rounds and seconds.
        every_round: called once a round (ceilings).
        on_round: progress, ``(rounds done, most rounds)``.
        enough: asked after every round; True ends the run, whatever the plan says.

    The first pass over all stages is warm-up and is thrown away.
    """
    names = list(stages)
    samples = {name: Samples() for name in names}
    for name in names:
        run_once(stages[name](), prompt, max(2, plan.decode_tokens // 4))
    started = time.perf_counter()
    for done in range(plan.max_rounds):
        spent = time.perf_counter() - started
        if done >= max(plan.min_rounds, 1) and spent + spent / done > plan.budget_s:
            break
        for i in range(len(names)):
            name = names[(i + done) % len(names)]
            model = stages[name]()
            if prompt.is_cuda:
                # switched on again a stage captures its graph anew, which a user waits for once
                run_once(model, prompt, plan.decode_tokens)
            prefill, decode = run_once(model, prompt, plan.decode_tokens)
            samples[name].prefill_ms.append(prefill)
            samples[name].decode_ms.append(decode)
        if every_round is not None:
            every_round()
        if on_round is not None:
            on_round(done + 1, plan.max_rounds)
        if enough is not None and enough(samples):
            break
    return samples
