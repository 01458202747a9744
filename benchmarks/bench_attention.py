"""attention against the machine and against eager and SDPA, alone and as a share of a decode step.

    python benchmarks/bench_attention.py [--shape qwen3-0.6b] [--depth 4096] [--layers N] [--rounds 9] [--json FILE]
        [--only ops | prefill | model]

Alone: the published shapes of the op's spec through ``llmopt.measure.kernel_bench`` (checked first; inputs rotate through
more than the last-level cache). Prefill: causal bfloat16 attention of ``--tokens`` queries at the sizes of Qwen3-0.6B, on the
loops this processor uses, on those in float32 and in SDPA, taking turns; only the results of SDPA are compared with, since
the reference holds all scores. In a model: one decode step after ``--depth`` cached tokens, with the time spent in
attention added up inside it (for latent attention the expansion of the latents belongs to it); eager attention, torch's
SDPA and ``swap_flash_attention`` take turns within each round, and figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from llmopt import native
from llmopt.measure import environment, kernel_bench
from llmopt.models import resolve_model, shapes
from llmopt.ops.attention import attention
from llmopt.ops.attention.spec import QWEN3_0_6B, SPEC, flops, sdpa
from llmopt.ops.spec import Case
from llmopt.passes import SwapFlashAttention
from llmopt.passes.base import PassContext, Patch
from llmopt.passes.swap_flash_attention.forward import INTERFACE_NAME, _eager_of


class Stopwatch:
    """Adds up the time spent in the functions it wraps. Wrapped calls inside wrapped calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = False

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            if self._running:
                return run(*args, **named)
            self._running, started = True, time.perf_counter()
            try:
                return run(*args, **named)
            finally:
                self._running = False
                self.seconds += time.perf_counter() - started

        return timed


def timed_names(watch: Stopwatch) -> dict[str, str]:
    """Names for a config under which each implementation runs with the watch on."""
    functions: dict[str, Callable[..., Any]] = {
        "eager": lambda module, *args, **named: _eager_of(module)(module, *args, **named),
        "sdpa": AttentionInterface()["sdpa"],
        "swap": AttentionInterface()[INTERFACE_NAME],
    }
    masks = {"eager": "eager", "sdpa": "sdpa", "swap": INTERFACE_NAME}
    for name, run in functions.items():
        AttentionInterface.register(f"timed_{name}", watch.around(run))
        AttentionMaskInterface.register(f"timed_{name}", AttentionMaskInterface()[masks[name]])
    return {name: f"timed_{name}" for name in functions}


def filled_cache(model: Any, depth: int) -> DynamicCache:
    """A cache of random entries, of the shapes that the model's own forward makes."""
    cache, g = DynamicCache(config=model.config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        probe = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    for i, layer in enumerate(probe.layers):
        shapes_of = [(1, x.shape[1], depth, x.shape[3]) for x in (layer.keys, layer.values)]
        cache.update(*(torch.randn(s, generator=g).to(model.dtype) for s in shapes_of), i)
    return cache


def decode_shares(model: Any, depth: int, rounds: int) -> tuple[dict[str, dict[str, list[float]]], Any]:
    """Step and attention seconds by implementation, and what the pass chose."""
    made = SwapFlashAttention().apply(PassContext(resolve_model(model), torch.device("cpu"), lambda event: None))
    watch, cache, token = Stopwatch(), filled_cache(model, depth), torch.zeros(1, 1, dtype=torch.long)
    names = timed_names(watch)
    samples: dict[str, dict[str, list[float]]] = {name: {"step": [], "attention": []} for name in names}
    for done in range(rounds + 1):
        for name, registered in names.items():
            with_pass = made.patch if name == "swap" else Patch()
            with_pass.enable()
            model.config._attn_implementation = registered
            for layer in resolve_model(model).layers:
                if name != "swap" and hasattr(type(layer.attention), "expand_kv"):
                    layer.attention.expand_kv = watch.around(type(layer.attention).expand_kv.__get__(layer.attention))
            watch.seconds, started = 0.0, time.perf_counter()
            with torch.no_grad():
                model(token, past_key_values=cache, use_cache=True)
            elapsed = time.perf_counter() - started
            cache.crop(-1)
            for layer in resolve_model(model).layers:
                if name != "swap":
                    vars(layer.attention).pop("expand_kv", None)
            with_pass.disable()
            if done:  # the first round warms up
                samples[name]["step"].append(elapsed)
                samples[name]["attention"].append(watch.seconds)
    return samples, made


def print_ops(rounds: int) -> list[kernel_bench.CaseResult]:
    print(
        f"{'case':36} {'us':>9} {'GB/s':>6} {'of read':>8} {'TFLOP/s':>8} {'of peak':>8} {'x eager':>8} {'x sdpa':>8}"
    )

    def show(r: kernel_bench.CaseResult) -> None:
        if r.wrong is not None or r.time is None:
            print(f"{r.case:36} wrong: {r.wrong}")
            return
        read = f"{r.read_fraction:8.0%}" if r.read_fraction is not None else "in cache"
        peak = f"{r.compute_fraction:8.0%}" if r.compute_fraction is not None else ""
        rivals = " ".join(f"{r.times_rival(name) or 0:8.2f}" for name in ("eager", "sdpa"))
        print(
            f"{r.case:36} {r.time.p50_us:9.1f} {r.gb_per_s:6.1f} {read} {r.tflop_per_s:8.3f} {peak} {rivals}",
            flush=True,
        )

    return kernel_bench.run(kernel_bench.select([SPEC]), rounds=rounds, on_result=show).results


@torch.no_grad()
def prefill_seconds(tokens: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each way through one prefill, and its floating point operations."""
    params = {**QWEN3_0_6B, "tq": tokens, "tk": tokens, "dtype": torch.bfloat16}
    inputs, library = SPEC.make_inputs(Case("", params), 0), native.library()
    rival = sdpa(**inputs)

    def in_float32() -> torch.Tensor:
        library.force_bf16_dots("off")
        if native.active_isa() == "amx":
            native.force_isa("avx512")
        return attention(**inputs)

    def with_dots() -> torch.Tensor:
        native.force_isa("avx512")
        library.force_bf16_dots("on")
        return attention(**inputs)

    ways = {"chosen": lambda: attention(**inputs), "float32": in_float32, "vdpbf16ps": with_dots, "sdpa": rival}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(rounds + 1):
        for name, run in list(ways.items()):
            try:
                started = time.perf_counter()
                out = run()
                elapsed = time.perf_counter() - started
            except ValueError:  # no such instruction here
                del ways[name]
                continue
            finally:
                native.force_isa("auto")
                library.force_bf16_dots("auto")
            if done:  # the first round warms up
                samples[name].append(elapsed)
            else:
                torch.testing.assert_close(out, rival(), rtol=3e-2, atol=1e-2)
    return {name: values for name, values in samples.items() if values}, flops(**inputs)


def print_prefill(tokens: list[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    found = {}
    print(f"\n{'prefill':>8} {'way':>10} {'ms':>9} {'TFLOP/s':>8} {'x sdpa':>7}")
    for count in tokens:
        found[count], operations = prefill_seconds(count, rounds)
        for name, values in found[count].items():
            typical = statistics.median(values)
            ratio = statistics.median(s / v for s, v in zip(found[count]["sdpa"], values, strict=True))
            print(
                f"{count:8} {name:>10} {typical * 1e3:9.2f} {operations / typical / 1e12:8.3f} {ratio:7.2f}", flush=True
            )
    return found


def print_shares(samples: dict[str, dict[str, list[float]]]) -> None:
    shares = {}
    for name, times in samples.items():
        step, attention = (statistics.median(times[kind]) * 1e3 for kind in ("step", "attention"))
        shares[name] = statistics.median(a / s for a, s in zip(times["attention"], times["step"], strict=True))
        print(f"{name:6} step {step:8.2f} ms, attention {attention:8.2f} ms, {shares[name]:.1%} of the step")
    times = [e / s for e, s in zip(samples["eager"]["attention"], samples["swap"]["attention"], strict=True)]
    print(
        f"attention {statistics.median(times):.1f}x faster than eager; share {shares['swap'] / shares['eager']:.3f} of eager's"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="only the first so many (a model that does not fit memory)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["ops", "prefill", "model"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 4096], help="queries of the prefill")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"environment": environment.capture()}
    print(f"{torch.get_num_threads()} threads, {native.active_isa()}, {args.rounds} rounds")
    if args.only in (None, "ops"):
        record["ops"] = [dataclasses.asdict(r) for r in print_ops(args.rounds)]
    if args.only in (None, "prefill"):
        record["prefill_seconds"] = print_prefill(args.tokens, args.rounds)
    if args.only in (None, "model"):
        model = shapes.build(args.shape, num_layers=args.layers)
        print(f"\n{args.shape}, {model.config.num_hidden_layers} layers, one decode step after {args.depth} tokens")
        samples, made = decode_shares(model, args.depth, args.rounds)
        print(
            f"the pass chose {made.coverage.implementations} in {made.details['choose_s']} s: {made.details['times_us']}"
        )
        print_shares(samples)
        record["decode_step"] = {"shape": args.shape, "depth": args.depth, "seconds": samples, "pass": made.details}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
