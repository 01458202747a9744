"""int4_linear against the machine: one row over a model's linears in order, and many rows, beside the ceilings.

    python benchmarks/bench_int4_linear.py [--shape qwen3-0.6b] [--rounds 15] [--json FILE]

One row: every quantized linear of the shape (head at 8 bits) in execution order, as in a decode step, four steps in a row
so that Python is warm and the weights are not; GB/s of packed bytes over the read bandwidth measured in the same round,
for the ops and for the modules that call them. Many rows: the shape's linears at 512 rows; TOP/s
over the peak of the dot-product instruction measured in the same round. Medians of interleaved rounds; the bfloat16
linears of the same sizes run in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, _ = build_quantized(args.shape)
    linears = linears_of(model)
    one = {m.in_features: torch.randn(1, m.in_features, dtype=torch.bfloat16) for m in linears}
    sizes = {(m.out_features, m.in_features): m for m in linears[:-1]}
    many = {k: torch.randn(MANY_ROWS, k, dtype=torch.bfloat16) for k in {k for _, k in sizes}}
    dense = {s: torch.randn(s, dtype=torch.bfloat16) for s in sizes}
    packed_bytes = sum(m.packed.numel() for m in linears)
    samples: dict[str, list[float]] = {"ops": [], "modules": [], "read": [], "peak": []}
    for n, k in sizes:
        samples[f"{n}x{k}"] = []
        samples[f"bf16 {n}x{k}"] = []

    calls = [
        (int4_linear if m.bits == 4 else int8_linear, one[m.in_features], m.packed, m.out_features, m.kernel_group)
        for m in linears
    ]

    def ops() -> None:
        for op, x, packed, out_features, group_size in calls:
            op(x, packed, out_features=out_features, group_size=group_size)

    def modules() -> None:
        for module in linears:
            module(one[module.in_features])

    def per_step(step: Callable[[], object]) -> float:
        step()
        return seconds(lambda: [step() for _ in range(STEPS)]) / STEPS

    with torch.no_grad(), CeilingMeter() as meter:
        for done in range(args.rounds + 1):
            ceilings = meter.measure_round()
            row: dict[str, float] = {"read": ceilings["read_gb_per_s"], "peak": ceilings["int8_tops"]}
            row["ops"], row["modules"] = (packed_bytes / per_step(step) / 1e9 for step in (ops, modules))
            for (n, k), module in sizes.items():
                operations = 2 * MANY_ROWS * n * k
                module(many[k])
                torch.nn.functional.linear(many[k], dense[n, k])
                row[f"{n}x{k}"] = operations / seconds(lambda m=module, x=many[k]: m(x)) / 1e12
                row[f"bf16 {n}x{k}"] = operations / seconds(
                    lambda w=dense[n, k], x=many[k]: torch.nn.functional.linear(x, w)
                ) / 1e12  # fmt: skip
            if done:  # the first round warms up
                for name, value in row.items():
                    samples[name].append(value)
    median = {name: statistics.median(values) for name, values in samples.items()}
    print(f"{args.shape}, {torch.get_num_threads()} threads, {native.active_isa()}, {args.rounds} rounds")
    for kind in ("ops", "modules"):
        share = statistics.median(a / b for a, b in zip(samples[kind], samples["read"], strict=True))
        print(f"one row, {kind}: {packed_bytes / 1e6:.0f} MB in order at {median[kind]:.1f} GB/s, read bandwidth "
              f"{median['read']:.1f} GB/s: {share:.1%}")  # fmt: skip
    for n, k in sizes:
        share = statistics.median(a / b for a, b in zip(samples[f"{n}x{k}"], samples["peak"], strict=True))
        print(f"{MANY_ROWS} rows: {n} x {k}: {median[f'{n}x{k}']:.3f} TOP/s, {share:.1%} of {median['peak']:.3f}; "
              f"bf16 linear {median[f'bf16 {n}x{k}']:.3f}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"environment": environment.capture(), "samples": samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
