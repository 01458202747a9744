"""What a decoded token costs at depth, beside one near the start, by dtype of the KV cache.

    python benchmarks/decode_depth.py [--shape deepseek-v2-lite] [--depths 128,8192] [--kv-dtypes bf16,int8] [--rounds 15]

Random int4 weights of the shape; the caches hold random numbers, since what they hold changes no time. Every round takes
each depth and dtype in turn, a few tokens of the recorded decode step each (what ``generate`` runs, without its Python).
Milliseconds a token are medians; the ratio to the first depth is of pairs, with a 95% interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from llmopt.measure import environment, stats, traffic
from llmopt.measure.ceilings import CeilingMeter, usable_meter
from llmopt.models import resolve_model, shapes
from llmopt.passes.fuse_kernels import KV_DTYPES
from llmopt.passes.quantize_gptq.direct import build_quantized
from llmopt.runtime.engine import Engine
from llmopt.runtime.step import DecodeStep


class Decoder:
    """A recorded step over a cache of its own, filled up to ``depth``."""

    def __init__(self, engine: Engine, depth: int, tokens: int) -> None:
        self.depth, self.tokens = depth, tokens
        self.cache = engine.new_cache(1, depth + tokens + 1)
        for part in (part for layer in range(len(self.cache.layers)) for part in self.cache.parts(layer)):
            part.random_(-127, 128) if part.dtype == torch.int8 else part.uniform_(-0.02, 0.02)
        for scales in [*self.cache.key_scales, *self.cache.value_scales]:
            scales.uniform_(1e-4, 2e-4)
        self.cache.length = depth
        self.step = DecodeStep(engine, self.cache, greedy=True)

    def ms_per_token(self) -> float:
        self.step.ids.random_(3, 1000)
        self.step.start(torch.tensor([self.depth]))
        started = time.perf_counter()
        for _ in range(self.tokens):
            self.step.run()
        return (time.perf_counter() - started) / self.tokens * 1e3


def measure(
    decoders: dict[tuple[str, int], Decoder], rounds: int, meter: CeilingMeter | None
) -> dict[str, list[float]]:
    """Milliseconds a token by ``dtype@depth``, a sample a round."""
    samples: dict[str, list[float]] = {f"{kind}@{depth}": [] for kind, depth in decoders}
    for done in range(rounds + 1):
        if meter is not None and done:
            meter.measure_round()
        for (kind, depth), decoder in decoders.items():
            ms = decoder.ms_per_token()
            if done:  # the first round warms up
                samples[f"{kind}@{depth}"].append(ms)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="deepseek-v2-lite", choices=sorted(shapes.SHAPES))
    parser.add_argument("--depths", default="128,8192")
    parser.add_argument("--kv-dtypes", default="bf16,int8", help=f"of {', '.join(KV_DTYPES)}")
    parser.add_argument("--tokens", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kinds, depths = args.kv_dtypes.split(","), [int(depth) for depth in args.depths.split(",")]
    if not set(kinds) <= set(KV_DTYPES):
        parser.error(f"--kv-dtypes: expected some of {', '.join(KV_DTYPES)}, got {args.kv_dtypes}")
    resolved = resolve_model(build_quantized(args.shape)[0])
    engines = {kind: Engine(resolved, kv_dtype=KV_DTYPES[kind]) for kind in kinds}
    decoders = {(kind, depth): Decoder(engines[kind], depth, args.tokens) for depth in depths for kind in kinds}
    meter = usable_meter()
    with meter or CeilingMeter():
        samples = measure(decoders, args.rounds, meter)
    print(f"{args.shape}, {torch.get_num_threads()} threads, {args.rounds} rounds of {args.tokens} tokens")
    if meter is not None:
        measured = ", ".join(f"{kind} {statistics.median(values):.3g}" for kind, values in meter.samples.items())
        print(f"ceilings in the same rounds: {measured}")
    weights = traffic.weight_bytes_per_token(resolved)
    for kind, depth in decoders:
        ms = samples[f"{kind}@{depth}"]
        rate = weights / statistics.median(ms) / 1e6
        text = f"{kind} at {depth:>5}: {statistics.median(ms):6.2f} ms a token (weights alone {rate:.1f} GB/s)"
        if depth != depths[0]:
            times = stats.ratio(ms, samples[f"{kind}@{depths[0]}"])
            text += f", {times.value:.2f}x [{times.low:.2f}, {times.high:.2f}] of {depths[0]}"
        print(text)
    if args.json:
        record = {"environment": environment.capture(), "ceilings": meter.samples if meter else {}, "samples": samples}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
