"""int4 times one row on an NVIDIA GPU: a Triton kernel against the read bandwidth. Needs torch for CUDA and Triton 3.6.

    python benchmarks/triton_gemv.py [--seconds 240] [--json FILE]

Not yet an op: it answers what the decode linear of a GPU has to look like (docs/decisions/0011). Weights are [N, K / 8]
words of eight codes, K-major, with a float16 scale for 128 inputs; activations are float16. Every configuration is checked
against float64 first, then timed in a CUDA graph of launches over weights that together are far larger than the L2; so are
the read bandwidth and torch's float16 linear.

Three ways to launch: "plain"; "wait" (programmatic dependent launch, but the kernel begins by waiting for the one before);
"ahead" (weights, which no kernel before writes, are asked for before waiting for the activations).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP = 128
LAUNCHES = ("plain", "wait", "ahead")
# merged q/k/v, output, gate or up, down, merged gate and up of Qwen3-8B
SHAPES = ((6144, 4096), (4096, 4096), (12288, 4096), (4096, 12288), (24576, 4096))

# Eight codes of a word times eight activations, in float16 pairs. A code in the low bits of 0x6400 is the number 1024 + code,
# 4 bits higher it is 1024 + 16 * code; no conversion is needed (Kim et al. 2022, "Who Says Elephants Can't Run"). Four
# products are added in float16, the rest in float32. 0x6408 is 1032, 0x2c00 1/16, 0xd480 -72.
DOT = """{
 .reg .b32 high, a, b, c, d, sum, z, s, o;
 .reg .f16 even, odd;
 .reg .f32 f, g;
 mov.b32 z, 0x64086408;
 mov.b32 s, 0x2c002c00;
 mov.b32 o, 0xd480d480;
 shr.u32 high, $1, 8;
 lop3.b32 a, $1, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 b, $1, 0x00f000f0, 0x64006400, 0xea;
 lop3.b32 c, high, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 d, high, 0x00f000f0, 0x64006400, 0xea;
 sub.f16x2 a, a, z;
 fma.rn.f16x2 b, b, s, o;
 sub.f16x2 c, c, z;
 fma.rn.f16x2 d, d, s, o;
 mul.f16x2 sum, a, $2;
 fma.rn.f16x2 sum, b, $3, sum;
 fma.rn.f16x2 sum, c, $4, sum;
 fma.rn.f16x2 sum, d, $5, sum;
 mov.b32 {even, odd}, sum;
 cvt.f32.f16 f, even;
 cvt.f32.f16 g, odd;
 add.f32 $0, f, g;
}"""


@triton.jit
def gemv(
    w_ptr, scale_ptr, x_ptr, y_ptr, WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LAUNCH: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """``y[ROWS] = w[ROWS, 8 * WORDS] @ x``, ``BLOCK`` words of every row at a time; x as :func:`planes` gives it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    words, groups = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 16)
    total = tl.zeros((ROWS, BLOCK // 16, 4), tl.float32)
    if LAUNCH == "wait":
        gdc_wait()
    if LAUNCH == "ahead":
        gdc_launch_dependents()
    w = tl.load(w_ptr + rows[:, None] * WORDS + words[None, :], eviction_policy="evict_first")
    if LAUNCH == "ahead":
        gdc_wait()
    for at in tl.static_range(0, WORDS, BLOCK):
        if at > 0:
            w = tl.load(w_ptr + rows[:, None] * WORDS + (at + words)[None, :], eviction_policy="evict_first")
        scale = tl.load(scale_ptr + rows[:, None] * (WORDS // 16) + (at // 16 + groups)[None, :]).to(tl.float32)
        x0 = tl.load(x_ptr + at + words)[None, :]
        x1 = tl.load(x_ptr + WORDS + at + words)[None, :]
        x2 = tl.load(x_ptr + 2 * WORDS + at + words)[None, :]
        x3 = tl.load(x_ptr + 3 * WORDS + at + words)[None, :]
        dots = tl.inline_asm_elementwise(
            ASM, "=f,r,r,r,r,r", [w, x0, x1, x2, x3], dtype=tl.float32, is_pure=True, pack=1
        )
        # four words of a thread are one group's: they share its scale
        total += tl.sum(dots.reshape(ROWS, BLOCK // 16, 4, 4), 3) * scale[:, :, None]
    if LAUNCH == "wait":
        gdc_launch_dependents()
    tl.store(y_ptr + rows, tl.sum(total.reshape(ROWS, BLOCK // 4), 1).to(tl.float16))


@triton.jit
def read(ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(ptr + at + tl.arange(0, BLOCK)), 0))


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[N, K]`` 0..15 -> words ``[N, K / 8]`` int32: the even ones of eight in the low half, the odd in the high."""
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], device=codes.device)
    words = (codes.unflatten(-1, (-1, 8)).long() << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def planes(x: torch.Tensor) -> torch.Tensor:
    """Activations ``[K]`` float16 -> ``[4, K / 8]`` int32: plane i holds the i-th pair of every eight."""
    return x.view(torch.int32).view(-1, 4).t().contiguous()


def microseconds(launches: list[Callable[[], object]], replays: int = 7) -> float:
    """Of one launch: the median of a graph's replays."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def read_tb_per_s() -> float:
    block, words = 4096, 2**28
    data = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device="cuda")
    out = torch.empty(words // block, dtype=torch.int32, device="cuda")
    return 4 * words / microseconds([lambda: read[(words // block,)](data, out, block, num_warps=4)] * 4) / 1e6


def configurations(n: int, words: int) -> list[tuple[int, int, int]]:
    """Rows, words at a time and warps of a program."""
    return [
        (rows, block, warps)
        for rows, block, warps in itertools.product((2, 4, 8, 1), (256, 512, 128), (1, 2, 4))
        if words % block == 0 and 4 <= rows * block / (32 * warps) <= 64 and n % rows == 0
    ]


def measure(n: int, k: int, deadline: float) -> dict[str, Any]:
    """Microseconds of every configuration that gives the right numbers; those that do not are an error."""
    weight_bytes = n * k // 2 + n * k // GROUP * 2
    copies = max(4, min(64, 600_000_000 // weight_bytes))
    codes = torch.randint(0, 16, (n, k), device="cuda")
    scale = (torch.rand(n, k // GROUP, device="cuda") * 0.02 + 0.01).half()
    x, y = torch.randn(k, device="cuda").half(), torch.empty(n, device="cuda", dtype=torch.float16)
    expected = (codes.double() - 8) * scale.double().repeat_interleave(GROUP, 1) @ x.double()
    packed, pairs = pack(codes), planes(x)
    weights = [packed.clone() for _ in range(copies)]
    dense = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(max(2, copies // 4))]
    linear = microseconds([lambda w=w: torch.nn.functional.linear(x[None], w) for w in dense])
    rows_of: list[dict[str, Any]] = []
    for (rows, block, warps), launch in itertools.product(configurations(n, k // 8), LAUNCHES):
        if time.monotonic() > deadline:
            break

        def run(w: torch.Tensor, r: int = rows, b: int = block, v: int = warps, how: str = launch) -> None:
            gemv[(n // r,)](
                w, scale, pairs, y, k // 8, r, b, how, DOT, num_warps=v, launch_pdl=how != "plain"
            )  # fmt: skip

        y.fill_(torch.nan)
        run(packed)
        error = float((y.double() - expected).norm() / expected.norm())
        if not error < 2e-3:
            raise RuntimeError(f"{n} x {k}, {launch}, {rows} rows, {block} words, {warps} warps: error {error}")
        us = microseconds([lambda w=w: run(w) for w in weights])
        rows_of.append({"launch": launch, "rows": rows, "words": block, "warps": warps, "us": us, "error": error})
    return {"n": n, "k": k, "bytes": weight_bytes, "float16_linear_us": linear, "runs": rows_of}


def show(result: dict[str, Any], bandwidth: float) -> None:
    print(
        f"{result['n']} x {result['k']}, {result['bytes'] / 1e6:.1f} MB: float16 linear {result['float16_linear_us']:.1f} us"
    )
    for launch in LAUNCHES:
        runs = [run for run in result["runs"] if run["launch"] == launch]
        if runs:
            best = min(runs, key=lambda run: run["us"])
            rate = result["bytes"] / best["us"] / 1e6
            print(
                f"  {launch:<6} {best['us']:6.2f} us  {rate:.2f} TB/s  {rate / bandwidth:.0%} of reading  "
                f"({best['rows']} rows, {best['words']} words, {best['warps']} warps)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    bandwidth = read_tb_per_s()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}: reading {bandwidth:.2f} TB/s")
    results = []
    for i, (n, k) in enumerate(SHAPES, 1):
        results.append(measure(n, k, started + args.seconds * i / len(SHAPES)))
        show(results[-1], bandwidth)
    if args.json:
        record = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "read_tb_per_s": bandwidth}
        args.json.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
