"""Time from a saved int4 checkpoint to the first token, in fresh processes, after imports.

    python benchmarks/load_time.py [--shape qwen3-0.6b] [--compile-tvm] [--rounds 7] [--json FILE]

Random int4 weights of the shape are saved into a temporary folder; they are loaded with fuse_kernels, and with compile_tvm
where that is asked for, its libraries on disk (TVM is imported before). Each round is two
processes. Both import what a program would have imported and read the files once (a warm file cache), then load and
generate one token from 128. One of them has touched and freed as much memory just before; the other comes after ten idle
seconds: a virtual machine may then have to ask its host for every page, which takes ten times as long as filling it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import llmopt
import llmopt.checkpoint.loader
import llmopt.runtime.generate  # both are imported later otherwise, and imports are not what is timed
from llmopt import native
from llmopt.measure import environment
from llmopt.models import shapes
from llmopt.passes import CompileTvm, FuseKernels
from llmopt.passes.base import Pass
from llmopt.passes.quantize_gptq.direct import build_quantized

PROMPT_TOKENS = 128
MEMORY = {"at_hand": "memory at hand", "fresh": "memory from the host"}
IDLE_S = 10
PARTS = ("load", "first_token", "sum")


def one_load(directory: Path, memory: str, *, compiled: bool) -> dict[str, float]:
    """Seconds of loading, of the first token, and their sum, in this process."""
    # as llmopt.json has it of a model that was optimized with it, after the trial
    passes: list[Pass] = [FuseKernels(screened_head=True)]
    if compiled:
        importlib.import_module("tvm.relax.frontend.torch")
        importlib.import_module("llmopt.passes.compile_tvm.current")
        passes.append(CompileTvm())
    getattr(transformers, json.loads((directory / "config.json").read_text())["architectures"][0])
    native.library()
    for file in directory.iterdir():
        file.read_bytes()
    if memory == "at_hand":
        torch.zeros(4 * total_bytes(directory), dtype=torch.uint8)
    started = time.perf_counter()
    model = llmopt.load(directory, passes=passes)
    loaded = time.perf_counter()
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    ended = time.perf_counter()
    return {"load": loaded - started, "first_token": ended - loaded, "sum": ended - started}


def total_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def measure(directory: Path, rounds: int, *, compiled: bool) -> dict[str, dict[str, list[float]]]:
    """Samples of :func:`one_load`, each from a process of its own."""
    samples: dict[str, dict[str, list[float]]] = {memory: {part: [] for part in PARTS} for memory in MEMORY}
    more = ["--compile-tvm"] if compiled else []
    if compiled:
        # from here on the libraries are on disk
        subprocess.run(
            [sys.executable, __file__, "--once", "at_hand", str(directory), *more], check=True, capture_output=True
        )
    for _ in range(rounds):
        for memory in MEMORY:
            time.sleep(IDLE_S if memory == "fresh" else 0)
            command = [sys.executable, __file__, "--once", memory, str(directory), *more]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            for part, seconds in json.loads(line).items():
                samples[memory][part].append(seconds)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--compile-tvm", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(one_load(Path(args.once[1]), args.once[0], compiled=args.compile_tvm)))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = llmopt.save(build_quantized(args.shape)[0], Path(folder) / "model")
        megabytes = total_bytes(directory) / 1e6
        samples = measure(directory, args.rounds, compiled=args.compile_tvm)
    print(f"{args.shape}, {megabytes:.0f} MB, {torch.get_num_threads()} threads, {args.rounds} processes each")
    for memory, name in MEMORY.items():
        for part in PARTS:
            low, middle, high = (f(samples[memory][part]) for f in (min, statistics.median, max))
            print(f"{name:<22}{part.replace('_', ' '):<12} {middle:.2f} s  [{low:.2f}, {high:.2f}]")
    if args.json:
        args.json.write_text(json.dumps({"environment": environment.capture(), "samples": samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
