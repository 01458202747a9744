"""Measures an optimize run and writes its receipt: pairs for verdicts, one ladder over all stages for the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmopt.measure import ceilings, environment, timing, traffic
from llmopt.measure.baseline import Baseline, OwnBaseline
from llmopt.measure.memory import module_bytes, peak_rss, peak_rss_reset
from llmopt.measure.report import Ceilings, Gain, Memory, PassRow, Quality, Report, Timing
from llmopt.models.base import ResolvedModel
from llmopt.passes.base import Applied, Event, Pass, Patch
from llmopt.stages import EAGER, STOCK, Stages

_PAIR_BUDGET_S, _LADDER_BUDGET_S = 12.0, 36.0
# fewest of the table: five pairs give an interval, and a large model's eager baseline takes seconds a round
_LADDER_ROUNDS = 5


class Receipt:
    """Gathers what goes into the report of one run."""

    def __init__(
        self, resolved: ResolvedModel, stages: Stages, emit: Callable[[Event], None], random_weights: bool,
        baseline: Baseline | None = None,
    ) -> None:  # fmt: skip
        self.resolved, self.stages, self.emit, self.random = resolved, stages, emit, random_weights
        self.source: Baseline = baseline or OwnBaseline(stages)
        self.plan = timing.Plan()
        self.request_tokens = timing.REQUEST_TOKENS
        self.baseline_quality: Quality | None = None
        self.baseline_weights = module_bytes(resolved.model)
        self.num_parameters = sum(p.numel() for p in resolved.model.parameters())
        self.baseline: Timing | None = None
        self.baseline_memory: Memory | None = None
        self.stock: Timing | None = None
        self.stock_gain: Gain | None = None
        self.ceilings: Ceilings | None = None
        self.measured_s = 0.0
        self.rounds = 0

    def time_pair(
        self, prompt: Callable[[int], torch.Tensor], name: str, before: Sequence[Patch], after: Sequence[Patch]
    ) -> tuple[timing.Samples, timing.Samples]:
        """Interleaved rounds of the stage before and the stage with one pass more."""
        plan = timing.Plan(decode_tokens=self.plan.decode_tokens, budget_s=_PAIR_BUDGET_S)
        started = time.perf_counter()
        samples = timing.interleaved(
            {"before": self.stages.stage(tuple(before)), "after": self.stages.stage(tuple(after))},
            prompt(plan.prompt_tokens), plan,
            on_round=lambda done, most: self.emit(Event("progress", name, "timing against the stage before", done, most)),
            enough=lambda s: timing.is_plain(s["before"], s["after"], self.request_tokens),
        )  # fmt: skip
        self.measured_s += time.perf_counter() - started
        return samples["before"], samples["after"]

    def memory(self) -> Memory:
        """Of the stage shown now."""
        return Memory(weights=module_bytes(self.resolved.model))

    def measure_ladder(
        self,
        prompt: Callable[[int], torch.Tensor],
        rows: list[PassRow],
        kept: list[tuple[Pass, Applied]],
        *,
        full: bool,
    ) -> None:
        """One interleaved run over baseline, stock and every kept stage; fills the rows."""
        started = time.perf_counter()
        patches = [applied.patch for _, applied in kept]
        ladder = self.source.ladder()
        for i, (item, _) in enumerate(kept):
            ladder[item.name] = self.stages.stage(tuple(patches[: i + 1]))
        if full:
            for i, (item, _) in enumerate(kept):
                ladder[f"without {item.name}"] = self.stages.stage((*patches[:i], *patches[i + 1 :]))
        plan = timing.Plan(
            decode_tokens=self.plan.decode_tokens, min_rounds=_LADDER_ROUNDS,
            budget_s=_LADDER_BUDGET_S * (2 if full else 1),
        )  # fmt: skip
        meter = ceilings.meter_for(self.resolved.device)
        samples = timing.interleaved(
            ladder, prompt(plan.prompt_tokens), plan, every_round=meter.measure_round if meter else None,
            on_round=lambda done, most: self.emit(Event("progress", "receipt", "timing all stages", done, most)),
        )  # fmt: skip
        if meter is not None:
            self.ceilings = meter.result()
            meter.close()
        self._fill(self.source.combine(samples), rows, kept, full)
        self._memory(ladder, prompt, rows)
        self.source.close()
        self.measured_s += time.perf_counter() - started

    def _fill(
        self, samples: dict[str, timing.Samples], rows: list[PassRow], kept: list[tuple[Pass, Applied]], full: bool
    ) -> None:
        prompt_tokens, decode_tokens = self.plan.prompt_tokens, self.plan.decode_tokens
        self.rounds = len(samples["eager"].decode_ms)
        self.baseline = samples["eager"].timing(prompt_tokens, decode_tokens)
        self.stock = samples["stock"].timing(prompt_tokens, decode_tokens)
        self.stock_gain = timing.gain(samples["eager"], samples["stock"])
        previous = samples["stock"] if self.stages.given != EAGER else samples["eager"]
        by_name = {row.name: row for row in rows}
        for item, _ in kept:
            row, now = by_name[item.name], samples[item.name]
            row.timing = now.timing(prompt_tokens, decode_tokens)
            row.marginal, row.total = timing.gain(previous, now), timing.gain(samples["eager"], now)
            if full:
                row.leave_one_out = timing.gain(samples[f"without {item.name}"], samples[kept[-1][0].name])
            previous = now

    def _memory(self, ladder: dict[str, Any], prompt: Callable[[int], torch.Tensor], rows: list[PassRow]) -> None:
        """Weights at rest, peak of this process over one request, and the share of the bandwidth decode reaches."""
        by_name: dict[str, PassRow | None] = {row.name: row for row in rows} | {"eager": None}
        if self.source.weight_bytes is not None:
            self.baseline_memory = Memory(self.source.weight_bytes, None, "computed: it is never held as a whole")
        for name, show in ladder.items():
            if name not in by_name:
                continue
            model, row = show(), by_name[name]
            fresh = peak_rss_reset()
            timing.run_once(model, prompt(self.plan.prompt_tokens), 2)
            peak = peak_rss()
            how = "this process, original weights of all stages included" if fresh else "since the process started"
            memory = Memory(module_bytes(model), peak.value, how if peak.value is not None else peak.how)
            if row is None:
                self.baseline_memory = memory
                continue
            row.memory = memory
            read = traffic.decode_bytes(self.resolved, self.plan.prompt_tokens, self.plan.decode_tokens)
            row.details["decode_bytes_per_token"] = read
            row.bandwidth_fraction = traffic.bandwidth_fraction(read, row.timing, self.ceilings)

    def report(self, rows: list[PassRow], notes: list[str], settings: dict[str, Any], total_s: float) -> Report:
        """The finished record."""
        config: Any = self.resolved.model.config
        stock = self.stages.given if self.stages.given != EAGER else STOCK
        return Report(
            model={
                "name": str(getattr(config, "_name_or_path", "") or config.model_type),
                "model_type": config.model_type,
                "parameters": self.source.parameters or self.num_parameters,
                "weight_bytes": self.source.weight_bytes or self.baseline_weights,
                "dtype": str(self.resolved.dtype).removeprefix("torch."),
                "random_weights": self.random,
            },
            environment=environment.capture(),
            settings={
                **settings,
                "prompt_tokens": self.plan.prompt_tokens,
                "decode_tokens": self.plan.decode_tokens,
                "rounds": self.rounds,
                "request_tokens": self.request_tokens,
                "total_s": round(total_s, 1),
            },
            baseline=self.baseline,
            stock=self.stock,
            stock_gain=self.stock_gain,
            stock_implementations={"attention": stock[0], "experts": stock[1]} if self.stock else {},
            baseline_quality=self.baseline_quality,
            baseline_memory=self.baseline_memory,
            passes=rows,
            ceilings=self.ceilings,
            notes=notes,
            measured_s=round(self.measured_s, 1),
        )
