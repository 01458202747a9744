"""The kernels that TVM generates for a decode step: without a schedule, with the default one, and tuned.

    python benchmarks/tune_kernels.py [--shape qwen3-0.6b] [--budget-s 60] [--json F] [--markdown F]

Two layers of a published shape in int4, without fuse_kernels, which leaves nothing to generate. Each kernel is called for one
token on one thread, its data in the cache; the three take turns, medians of the rounds. In a step most of a kernel's time
is fetching what another thread wrote, and a barrier (``benchmarks/step_profile.py --passes compile_tvm``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm.s_tir import Schedule

from llmopt.measure import environment, stats
from llmopt.models import resolve_model, shapes
from llmopt.passes.compile_tvm import compiled, schedules
from llmopt.passes.compile_tvm.engine import TvmEngine
from llmopt.passes.compile_tvm.records import Records
from llmopt.passes.compile_tvm.tuning import Candidate, one_token, tune
from llmopt.passes.quantize_gptq.direct import build_quantized

ROUNDS = 31
TARGET = compiled.target(torch.device("cpu"))
HEADINGS = ("kernel", "unscheduled us", "default us", "faster by", "tuned us", "faster by", "tried")


def measured(kernel: Any, chosen: Any, target: Any) -> dict[str, list[float]]:
    """Microseconds of each round."""
    best = schedules.default(kernel) if chosen is None else schedules.replayed(kernel, chosen)
    contenders = {"unscheduled": Schedule(kernel), "default": schedules.default(kernel), "tuned": best}
    candidates = {name: Candidate.of(schedule, target) for name, schedule in contenders.items()}
    arguments = one_token(kernel)
    us: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(ROUNDS):
        for name in sorted(candidates, reverse=done % 2 == 1):
            us[name].append(candidates[name].us(arguments))
    return us


def row(name: str, us: dict[str, list[float]], tried: int) -> str:
    medians = {of: f"{statistics.median(each):.2f}" for of, each in us.items()}
    cells = [
        name, medians["unscheduled"], medians["default"], said(us["unscheduled"], us["default"]),
        medians["tuned"], said(us["default"], us["tuned"]), str(tried),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def said(old: list[float], new: list[float]) -> str:
    ratio = stats.ratio(old, new)
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    engine = TvmEngine(resolve_model(build_quantized(f"{args.shape}@2")[0]), None)
    kernels = compiled.lower(list(engine.kinds.values()), engine.hidden_size, TARGET).kernels
    target = tvm.target.Target(TARGET)
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Path(folder) / "records.json", TARGET)
        started = time.perf_counter()
        tune(kernels, records, target, args.budget_s, lambda name, finished: None)
        seconds = time.perf_counter() - started
    found = {}
    rows = []
    for name, kernel in kernels.items():
        record = records.find(schedules.name_of(kernel))
        assert record is not None
        found[name] = {"us": measured(kernel, record.schedule, target), "tried": record.tried, "done": record.done}
        rows.append(row(name, found[name]["us"], record.tried))
    described = environment.capture()
    text = "\n".join(
        [
            f"# Generated kernels and their schedules, {args.shape}, {described['date'][:10]}\n",
            f"    python benchmarks/tune_kernels.py --shape {args.shape} --budget-s {args.budget_s:g}\n",
            f"{described['cpu']['model']}, one thread, data in the cache; medians of {ROUNDS} interleaved rounds, with 95% "
            f"intervals. The search took {seconds:.1f} s of {args.budget_s:g} s.\n",
            f"| {' | '.join(HEADINGS)} |",
            "|---" * len(HEADINGS) + "|",
            *rows,
        ]
    )
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(
            json.dumps({"environment": described, "seconds": seconds, "kernels": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
