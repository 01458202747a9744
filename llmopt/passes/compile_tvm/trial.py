"""Which of two compilers made the faster step: both in turns, on this model and machine."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from llmopt.measure import stats
from llmopt.passes.base import PassContext
from llmopt.passes.compile_tvm.compiled import COMPILERS_RAISE, said
from llmopt.passes.compile_tvm.current import Current
from llmopt.passes.compile_tvm.verify import verify
from llmopt.runtime.engine import Engine
from llmopt.runtime.step import DecodeStep

_TOKENS, _MOST_ROUNDS, _SECONDS = 8, 15, 6.0


class StepTimer:
    """A greedy decode step over a cache of its own, which is taken for filled up to ``depth``.

    Args:
        engine: the model.
        depth: slots before the first token; what they hold changes no time.
        tokens: of a turn.
    """

    def __init__(self, engine: Engine, depth: int, tokens: int = _TOKENS) -> None:
        self._depth, self._tokens = depth, tokens
        cache = engine.new_cache(1, depth + tokens + 1)
        for tensor in cache.tensors():
            tensor.zero_()
        cache.length = depth
        self._step = DecodeStep(engine, cache, greedy=True)
        self._device = engine.device

    def ms_per_token(self) -> float:
        """Milliseconds a token of one turn."""
        self._step.start(torch.tensor([self._depth], device=self._device))
        self._wait()
        started = time.perf_counter()
        for _ in range(self._tokens):
            self._step.run()
        self._wait()
        return (time.perf_counter() - started) / self._tokens * 1e3

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@torch.no_grad()
def compare(engines: dict[str, Engine], depth: int) -> dict[str, Any]:
    """Time steps of the engines in turns.

    Args:
        engines: two of them, by name.
        depth: at which they decode.

    Returns:
        ``ms_per_token`` of each, medians; ``ratio`` of the second's times to the first's, with a 95% interval; ``rounds``.
    """
    timers = {name: StepTimer(engine, depth) for name, engine in engines.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.ms_per_token()
    began = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        for name in sorted(timers, reverse=done % 2 == 1):
            samples[name].append(timers[name].ms_per_token())
        if done >= 4 and time.perf_counter() - began > _SECONDS:
            break
    first, second = samples.values()
    return {
        "ms_per_token": {name: statistics.median(ms) for name, ms in samples.items()},
        "ratio": dataclasses.asdict(stats.ratio(second, first)),
        "rounds": len(first),
        "depth": depth,
    }


def against_graph(ctx: PassContext, current: Current) -> dict[str, Any]:
    """Time the step as a CUDA graph with and without TVM's kernels, and let ``current`` have the graph alone unless they win.

    Args:
        ctx: of the pass, whose patch is off.
        current: whose engine is TVM's; the graph's after this where TVM's is not faster beyond noise.

    Returns:
        What :func:`compare` gives; the ratio: the graph's time to that with TVM.
    """
    rival = current.make("graph")
    found = compare({"tvm": current.get(), "graph": rival}, ctx.prompt_tokens)
    if not found["ratio"]["low"] > 1:
        current.adopt(rival, "graph")
    return found


def against_inductor(ctx: PassContext, current: Current) -> dict[str, Any]:
    """Compile the step by Inductor too, verify it, time both, and let ``current`` have the faster.

    Args:
        ctx: of the pass, whose patch is off.
        current: whose engine is TVM's; Inductor's after this where that is faster beyond noise.

    Returns:
        ``compile_s`` and what :func:`verify` and :func:`compare` give (the ratio: Inductor's time to TVM's). Or ``failed``:
        why there is nothing to compare.
    """
    try:
        rival = current.make("inductor")
        started = time.perf_counter()
        StepTimer(rival, ctx.prompt_tokens).ms_per_token()
        seconds = time.perf_counter() - started
        verified = verify(ctx, rival)
        found = compare({"tvm": current.get(), "inductor": rival}, ctx.prompt_tokens)
    except COMPILERS_RAISE as error:  # for want of a C++ compiler, among others; TVM's step is there
        return {"failed": said(error)}
    if found["ratio"]["high"] < 1:
        current.adopt(rival, "inductor")
    return {"compile_s": seconds, "verified": verified, **found}
