"""int4_linear against the machine: one row over a model's linears in order, and many rows, beside the ceilings.

    python benchmarks/bench_int4_linear.py [--shape qwen3-0.6b] [--isa avx512] [--rounds 15] [--json FILE]

One row: every quantized linear of the shape (head at 8 bits) in execution order, as in a decode step, four steps in a row
so that Python is warm and the weights are not; GB/s of packed bytes over the read bandwidth measured in the same round,
for the ops and for the modules that call them. Many rows: the shape's linears at 512 rows; TOP/s over the peak of the
dot-product instruction, of the instruction set in force, measured in the same round. Medians of interleaved rounds; the
bfloat16 linears of the same sizes run in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmopt import native
from llmopt.measure import environment
from llmopt.measure.ceilings import CeilingMeter
from llmopt.models import resolve_model, shapes
from llmopt.ops.int4_linear import int4_linear
from llmopt.ops.int8_linear import int8_linear
from llmopt.packed import QuantLinear
from llmopt.passes.quantize_gptq.direct import build_quantized

MANY_ROWS = 512
STEPS = 4


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def linears_of(model: Any) -> list[QuantLinear]:
    """Quantized linears in the order a token meets them, the head last."""
    resolved = resolve_model(model)
    found = [getattr(s.parent, s.attr) for layer in resolved.layers for s in layer.linears()]
    return [*found, getattr(resolved.head.parent, resolved.head.attr)]


def per_step(step: Callable[[], object]) -> float:
    step()
    return seconds(lambda: [step() for _ in range(STEPS)]) / STEPS


def one_row(linears: list[QuantLinear]) -> dict[str, Callable[[], float]]:
    """GB/s of packed bytes, one decode step's linears in order: of the ops, and of the modules that call them."""
    inputs = {m.in_features: torch.randn(1, m.in_features, dtype=torch.bfloat16) for m in linears}
    packed_bytes = sum(m.packed.numel() for m in linears)
    calls = [
        (int4_linear if m.bits == 4 else int8_linear, inputs[m.in_features], m.packed, m.out_features, m.kernel_group)
        for m in linears
    ]

    def ops() -> None:
        for op, x, packed, out_features, group_size in calls:
            op(x, packed, out_features=out_features, group_size=group_size)

    def modules() -> None:
        for module in linears:
            module(inputs[module.in_features])

    return {
        "ops": lambda: packed_bytes / per_step(ops) / 1e9,
        "modules": lambda: packed_bytes / per_step(modules) / 1e9,
    }


def many_rows(linears: list[QuantLinear]) -> dict[str, Callable[[], float]]:
    """TOP/s of each size at 512 rows, by ``out x in``; with ``bf16`` before it, of torch's bfloat16 linear."""
    runs: dict[str, Callable[[], float]] = {}
    for (n, k), module in {(m.out_features, m.in_features): m for m in linears}.items():
        x, dense = (torch.randn(rows, k, dtype=torch.bfloat16) for rows in (MANY_ROWS, n))

        def rate(run: Callable[..., object], *given: torch.Tensor, tera: float = 2e-12 * MANY_ROWS * n * k) -> float:
            return tera / seconds(lambda: run(*given))

        runs[f"{n} x {k}"] = partial(rate, module, x)
        runs[f"bf16 {n} x {k}"] = partial(rate, torch.nn.functional.linear, x, dense)
    return runs


@torch.no_grad()
def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples of every run and of the ceilings, interleaved."""
    samples: dict[str, list[float]] = {}
    with CeilingMeter() as meter:
        for done in range(rounds + 1):
            ceilings = meter.measure_round()
            row = {"read": ceilings["read_gb_per_s"], "peak": ceilings["int8_tops"]}
            row.update((name, run()) for name, run in runs.items())
            for name, value in row.items() if done else ():  # the first round warms up
                samples.setdefault(name, []).append(value)
    return samples


def show(samples: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in samples.items()}

    def share(name: str, of: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(samples[name], samples[of], strict=True)):.1%}"

    for kind in ("ops", "modules"):
        print(f"one row, {kind}: {median[kind]:.1f} GB/s, {share(kind, 'read')} of {median['read']:.1f}")
    for size in (name for name in samples if name[0].isdigit()):
        print(f"{MANY_ROWS} rows: {size}: {median[size]:.3f} TOP/s, {share(size, 'peak')} of {median['peak']:.3f}; "
              f"bf16 linear {median[f'bf16 {size}']:.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--isa", default="auto", help="auto, portable, avx2, avx512 or amx")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    native.force_isa(args.isa)
    linears = linears_of(build_quantized(args.shape)[0])
    samples = measure({**one_row(linears), **many_rows(linears[:-1])}, args.rounds)
    print(f"{args.shape}, {torch.get_num_threads()} threads, {native.active_isa()}, {args.rounds} rounds")
    show(samples)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment.capture(), "samples": samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
