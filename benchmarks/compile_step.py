"""The compiled decode step beside the model without it: time a token, and what compiling costs.

    python benchmarks/compile_step.py [--shape ernie-4.5-0.3b] [--weights bf16,int4] [--rounds 9] [--json F] [--markdown F]

Random weights of a published shape, plain in bfloat16 or built directly in int4. Contenders take turns in `generate` on one
prompt of 128 tokens: the model as it is, compile_tvm by TVM and by Inductor, fuse_kernels, and fuse_kernels with either.
TPOT is the median between the tokens after the first. Compiling is timed in this process: TVM with an empty cache on disk,
then again from what it kept there; Inductor to the end of its first steps, with an empty cache of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmopt.measure import environment, stats, timing
from llmopt.measure.ceilings import CeilingMeter, usable_meter
from llmopt.measure.memory import current_rss
from llmopt.models import resolve_model, shapes
from llmopt.passes import CompileTvm, FuseKernels
from llmopt.passes.base import Applied, PassContext, Patch
from llmopt.passes.quantize_gptq.direct import build_quantized

PROMPT, TOKENS = 128, 24
HEADINGS = (
    "weights", "decode step", "TPOT ms", "faster by", "over Inductor", "compile s", "from cache s", "kernels", "tokens agree",
)  # fmt: skip
BASE, TVM, INDUCTOR, FUSED = "as it is", "tvm", "inductor", "fused"


class Subject:
    """One model, and patches that are switched on for a contender's turn."""

    def __init__(self, model: Any) -> None:
        self.model, self.resolved = model, resolve_model(model)
        self.stages: dict[str, list[Patch]] = {BASE: []}
        self.facts: dict[str, dict[str, Any]] = {}
        self._on: list[Patch] = []

    def context(self) -> PassContext:
        return PassContext(self.resolved, self.resolved.device, lambda event: None, prompt_tokens=PROMPT)

    def show(self, name: str) -> Any:
        """The model with these patches and no others."""
        for patch in reversed(self._on):
            patch.disable()
        assert "generate" not in vars(self.model)
        self._on = self.stages[name]
        for patch in self._on:
            patch.enable()
        return self.model

    def compile(self, name: str, under: list[Patch], backend: str) -> None:
        """Add a contender: the compiled step over ``under``."""
        applied, seconds, grown = self._applied(CompileTvm(backend=backend))
        facts = {"apply_s": seconds, "rss_grown": grown, **applied.details}
        if backend == TVM:
            again, _, _ = self._applied(CompileTvm(backend=backend))
            facts["again"] = {key: again.details[key] for key in ("cache", "compile_s")}
        self.facts[name] = facts
        self.stages[name] = [*under, applied.patch]

    def _applied(self, item: CompileTvm) -> tuple[Applied, float, int]:
        gc.collect()
        before, started = current_rss().value or 0, time.perf_counter()
        applied = item.apply(self.context())
        seconds = time.perf_counter() - started
        gc.collect()
        return applied, seconds, (current_rss().value or 0) - before


@contextmanager
def empty_caches() -> Iterator[None]:
    names = ("LLMOPT_CACHE", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.pop(name, None) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: f"{folder}/{name.lower()}" for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def contenders(model: Any, *, inductor: bool) -> Subject:
    subject = Subject(model)
    backends = [TVM, INDUCTOR] if inductor else [TVM]
    for backend in backends:
        subject.compile(backend, [], backend)
    fused = FuseKernels().apply(subject.context()).patch
    subject.stages[FUSED] = [fused]
    subject.show(FUSED)
    for backend in backends:
        subject.compile(f"{FUSED}, {backend}", [fused], backend)
    return subject


def record(subject: Subject, rounds: int, meter: CeilingMeter | None) -> dict[str, Any]:
    prompt = torch.randint(5, subject.resolved.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    stages: dict[str, Callable[[], Any]] = {name: lambda name=name: subject.show(name) for name in subject.stages}
    plan = timing.Plan(PROMPT, TOKENS, min_rounds=rounds, max_rounds=rounds, budget_s=0.0)
    samples = timing.interleaved(stages, prompt, plan, every_round=meter.measure_round if meter else None)
    return {
        "facts": subject.facts,
        "tpot_ms": {name: found.decode_ms for name, found in samples.items()},
        "ceilings": meter.samples if meter else {},
    }


def lines(weights: str, found: dict[str, Any]) -> Iterator[str]:
    """Rows of the table."""
    tpot, facts = found["tpot_ms"], found["facts"]
    for name, samples in tpot.items():
        ms = stats.interval(samples)
        against = FUSED if name.startswith(FUSED) and name != FUSED else BASE
        ratio = "" if name == BASE else said(stats.ratio(tpot[against], samples))
        rival = name.replace(TVM, INDUCTOR)
        ahead = said(stats.ratio(tpot[rival], samples)) if rival != name and rival in tpot else ""
        cost = facts.get(name, {})
        cells = [
            weights, name, f"{ms.value:.2f} [{ms.low:.2f}, {ms.high:.2f}]", ratio, ahead,
            number(cost.get("compile_s", cost.get("apply_s"))), number(cost.get("again", {}).get("compile_s")),
            len(cost["kernels"]) if "kernels" in cost else "", cost["verified"]["agree"] if cost else "",
        ]  # fmt: skip
        yield "| " + " | ".join(str(cell) or "-" for cell in cells) + " |"


def number(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2g}"


def said(ratio: Any) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="ernie-4.5-0.3b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--weights", default="bf16,int4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    rows = []
    for weights in args.weights.split(","):
        model = shapes.build(args.shape, seed=0) if weights == "bf16" else build_quantized(args.shape)[0]
        meter = usable_meter()
        with empty_caches(), meter or CeilingMeter():
            results[weights] = record(contenders(model, inductor=not args.no_inductor), args.rounds, meter)
        rows += lines(weights, results[weights])
        print("\n".join(rows), flush=True)
        del model
        gc.collect()
    command = f"python benchmarks/compile_step.py --shape {args.shape} --weights {args.weights} --rounds {args.rounds}"
    described = environment.capture()
    text = "\n".join(
        [
            f"# The compiled step, {args.shape}, {described['date'][:10]}\n",
            f"    {command}\n",
            f"{described['cpu']['model']}, {described['threads']} threads; TPOT in ms at depth {PROMPT}, median and 95% "
            f"interval of {args.rounds} interleaved rounds. Ratios: of the model as it is, or of fuse_kernels. Seconds: TVM's "
            "compiling with an empty cache and from it; Inductor's with verifying. Tokens that agree: of 16.\n",
            f"| {' | '.join(HEADINGS)} |",
            "|---" * len(HEADINGS) + "|",
            *rows,
        ]
    )
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps({"environment": described, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
