"""Where a decoded token's time goes: the calls of its step, op by op, and what lies outside of it.

    python benchmarks/step_profile.py [--shape ernie-4.5-0.3b] [--weights int4] [--passes fuse_kernels] [--json F]

Random weights of a published shape, built directly in the format asked for; ``generate`` decodes with a streamer behind a
prompt of 128 tokens. *Outside the step* is the time from token to token less that of the step: ``generate`` itself, in
Python. Calls are timed in a run of their own, behind the same prompt; kernels that TVM generated are counted together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llmopt.measure import environment, timing
from llmopt.models import resolve_model, shapes
from llmopt.ops import SPECS
from llmopt.passes import PASSES
from llmopt.passes.base import PassContext
from llmopt.passes.quantize_gptq.direct import build_quantized
from llmopt.runtime.step import DecodeStep

PROMPT, TOKENS = 128, 65


@contextmanager
def watched() -> Iterator[tuple[list[float], list[DecodeStep]]]:
    """Seconds of each run of a decode step, and the steps themselves."""
    seconds: list[float] = []
    steps: list[DecodeStep] = []
    run = DecodeStep.run

    def timed(step: DecodeStep) -> None:
        started = time.perf_counter()
        run(step)
        seconds.append(time.perf_counter() - started)
        steps[:] = [step]

    with mock.patch.object(DecodeStep, "run", timed):
        yield seconds, steps


def profile(model: Any, rounds: int) -> dict[str, Any]:
    """TPOT, the step's share of it, and the calls of the step: medians of the rounds."""
    prompt = torch.randint(5, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, Any]] = []
    for _ in range(rounds + 1):  # the first one warms up
        clock = timing.Clock()
        with watched() as (seconds, steps):
            timing.request(model, prompt, TOKENS, clock)
        # the prompt is put first, and the first token after it is prefill's
        waited = [b - a for a, b in zip(clock.stamps[1:], clock.stamps[2:], strict=False)]
        # over the slots of the last tokens: the cache has room for no others
        for place in (steps[0].rows.slot, steps[0].rows.position):
            place -= TOKENS // 2
        calls = by_op(steps[0].profile(TOKENS // 2))
        tpot, step = statistics.median(waited) * 1e3, statistics.median(seconds) * 1e3
        found.append({"tpot_ms": tpot, "step_ms": step, "outside_ms": tpot - step, "calls": calls})
    middle = {key: statistics.median(one[key] for one in found[1:]) for key in ("tpot_ms", "step_ms", "outside_ms")}
    ops = {
        op: {"calls": calls["calls"], "ms": statistics.median(one["calls"][op]["ms"] for one in found[1:])}
        for op, calls in found[-1]["calls"].items()
    }
    return {**middle, "ops": dict(sorted(ops.items(), key=lambda item: -item[1]["ms"]))}


def by_op(calls: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Calls and milliseconds of each op; what is no op of ours was generated."""
    found: dict[str, dict[str, float]] = {}
    for name, seconds in calls:
        op = name if name in SPECS or name == "advance" else f"generated: {name}"
        entry = found.setdefault(op, {"calls": 0, "ms": 0.0})
        entry["calls"] += 1
        entry["ms"] += seconds * 1e3
    return found


def table(found: dict[str, Any]) -> str:
    step = sum(op["ms"] for op in found["ops"].values())
    generated = sum(op["ms"] for name, op in found["ops"].items() if name.startswith("generated"))
    rows = ["| call | calls | ms a token | us a call | share of the step |", "|---|---|---|---|---|"]
    rows += [
        f"| {name} | {op['calls']} | {op['ms']:.3f} | {op['ms'] / op['calls'] * 1e3:.1f} | {op['ms'] / step:.1%} |"
        for name, op in found["ops"].items()
    ]
    rows += [
        "",
        f"TPOT {found['tpot_ms']:.2f} ms, of it {found['outside_ms']:.3f} ms ({found['outside_ms'] / found['tpot_ms']:.1%}) "
        f"outside the step; generated kernels {generated:.3f} ms ({generated / step:.1%} of the step).",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="ernie-4.5-0.3b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--weights", default="int4", choices=("int4", "bf16"))
    parser.add_argument("--passes", default="fuse_kernels", help=f"with commas, of {', '.join(PASSES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    model = shapes.build(args.shape, seed=0) if args.weights == "bf16" else build_quantized(args.shape)[0]
    resolved = resolve_model(model)
    for name in args.passes.split(","):
        # a model built quantized is refused by optimize
        ctx = PassContext(resolved, resolved.device, lambda event: None, prompt_tokens=PROMPT)
        PASSES[name]().apply(ctx).patch.enable()
    found = profile(model, args.rounds)
    described = environment.capture()
    command = (
        f"python benchmarks/step_profile.py --shape {args.shape} --weights {args.weights} --passes {args.passes} "
        f"--rounds {args.rounds}"
    )
    text = (
        f"# A token's time, {args.shape}, {args.weights}, {args.passes}, {described['date'][:10]}\n\n    {command}\n\n"
        f"{described['cpu']['model']}, {described['threads']} threads, depth {PROMPT}; medians of {args.rounds} rounds.\n\n"
        f"{table(found)}"
    )
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps({"environment": described, "command": command, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
