"""int4 times 8 to 32 rows on an NVIDIA GPU: benchmarks/cuda_gemm.cu against the read bandwidth. Needs torch for CUDA and nvcc.

    python -m benchmarks.cuda_gemm [--seconds 240] [--library FILE] [--json FILE]

Every configuration is checked against float64 first, then timed in a CUDA graph of launches over weights that together are far
larger than the L2, as in triton_gemv.py: "plain", and "ahead", where a launch may begin before the one before it ends and asks
for its first weights before it waits for its inputs. So are the read bandwidth and torch's float16 linear.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import re
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.triton_gemv import GROUP, SHAPES, microseconds, read_tb_per_s

SOURCE = Path(__file__).with_suffix(".cu")
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
LAUNCHES = ("plain", "ahead")
TOKENS = (8, 16, 32)
# sixteens of weight rows a block, its warps, groups of 128 inputs in flight in each, blocks that share a row's inputs
CONFIGURATIONS = [
    tuple(map(int, case.groups()))
    for case in re.finditer(r"^  CASE\((\d+), (\d+), (\d+), (\d+)\)", SOURCE.read_text(), re.MULTILINE)
]


def build(library: Path) -> None:
    """Compile the kernels for the GPU at hand."""
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    target = f"arch=compute_{arch},code=sm_{arch}"
    subprocess.run(
        ["nvcc", f"-gencode={target}", "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-shared", SOURCE, "-o", library],
        check=True,
    )


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[M, K]`` 0..15 -> words ``[M / 16, K / 64, 32, 4]`` int32, a lane's four tiles of 16 x 16."""
    m, k = codes.shape
    # [M / 16, half, g] x [K / 64, t, j, pair, 2]
    parts = codes.view(m // 16, 2, 8, k // 64, 4, 4, 2, 2).long()
    # [M / 16, K / 64, g, t, j, pair, half, 2]: eight codes of a word
    parts = parts.permute(0, 3, 2, 4, 5, 6, 1, 7).reshape(m // 16, k // 64, 32, 4, 8)
    words = (parts << torch.tensor(SHIFTS, device=codes.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def pack_inputs(x: torch.Tensor) -> torch.Tensor:
    """Inputs ``[tokens, K]`` -> ``[K / 64, tokens / 8, 2, 32, 8]``, a lane's sixteen of every 64 in two halves."""
    tokens, k = x.shape
    # [tokens / 8, g, K / 64, t, half, 8]
    parts = x.view(tokens // 8, 8, k // 64, 4, 2, 8).permute(2, 0, 4, 1, 3, 5)
    return parts.reshape(k // 64, tokens // 8, 2, 32, 8).contiguous()


class Gemm:
    """One shape's weights, and calls of the kernels on them."""

    def __init__(self, library: Any, m: int, k: int) -> None:
        self.library, self.m, self.k = library, m, k
        self.codes = torch.randint(0, 16, (m, k), device="cuda")
        self.scale = (torch.rand(m, k // GROUP, device="cuda") * 0.02 + 0.01).half()
        self.columns, self.packed = self.scale.t().contiguous(), pack(self.codes)
        self.bytes = m * k // 2 + m * k // GROUP * 2
        self.copies = [self.packed.clone() for _ in range(max(4, min(64, 600_000_000 // self.bytes)))]

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.codes.double() - 8) * self.scale.double().repeat_interleave(GROUP, 1)
        return x.double() @ weight.t()

    def run(self, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, how: tuple[int, ...], ahead: bool) -> None:
        tiles, warps, groups, split = how
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight, self.columns, x, y))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = self.library.int4_gemm(
            tiles, x.shape[1], warps, groups, split, *pointers, self.m, self.k, int(ahead), stream
        )
        if error:
            raise RuntimeError(f"{self.m} x {self.k}, {how}: error {error}")


def measure(gemm: Gemm, tokens: int, deadline: float) -> dict[str, Any]:
    """Microseconds of every configuration that gives the right numbers; those that do not are an error."""
    plain = torch.randn(tokens, gemm.k, device="cuda").half()
    y = torch.empty(tokens, gemm.m, device="cuda", dtype=torch.float16)
    expected, runs, x = gemm.expected(plain), [], pack_inputs(plain)
    for how, launch in itertools.product(CONFIGURATIONS, LAUNCHES):
        if time.monotonic() > deadline or gemm.m % (16 * how[0]):
            continue
        y.fill_(torch.nan)
        gemm.run(gemm.packed, x, y, how, launch == "ahead")
        error = float((y.double() - expected).norm() / expected.norm())
        if not error < 2e-3:
            raise RuntimeError(f"{gemm.m} x {gemm.k}, {tokens} tokens, {launch}, {how}: error {error}")
        us = microseconds([partial(gemm.run, w, x, y, how, launch == "ahead") for w in gemm.copies])
        names = ("tiles", "warps", "ahead", "split")
        runs.append({"launch": launch, **dict(zip(names, how, strict=True)), "us": us, "error": error})
    dense = [torch.randn(gemm.m, gemm.k, device="cuda").half() for _ in range(max(2, len(gemm.copies) // 4))]
    linear = microseconds([lambda w=w: torch.nn.functional.linear(plain, w) for w in dense])
    return {"m": gemm.m, "k": gemm.k, "tokens": tokens, "bytes": gemm.bytes, "float16_linear_us": linear, "runs": runs}


def show(result: dict[str, Any], bandwidth: float) -> None:
    print(f"{result['m']} x {result['k']}, {result['bytes'] / 1e6:.1f} MB, {result['tokens']} tokens: "
          f"float16 linear {result['float16_linear_us']:.1f} us")  # fmt: skip
    for launch in LAUNCHES:
        runs = [run for run in result["runs"] if run["launch"] == launch]
        if len(runs) < len(CONFIGURATIONS):
            print(f"  {launch:<6} {len(CONFIGURATIONS) - len(runs)} of {len(CONFIGURATIONS)} configurations not timed")
        if runs:
            best = min(runs, key=lambda run: run["us"])
            rate = result["bytes"] / best["us"] / 1e6
            print(f"  {launch:<6} {best['us']:6.2f} us  {rate:.2f} TB/s  {rate / bandwidth:.0%} of reading  "
                  f"({best['tiles']} tiles, {best['warps']} warps, {best['ahead']} ahead, split {best['split']})")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--library", type=Path, help="compiled before")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        library = args.library or Path(folder) / "cuda_gemm.so"
        if args.library is None:
            build(library)
        kernels = ctypes.CDLL(str(library))
    bandwidth = read_tb_per_s()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: reading {bandwidth:.2f} TB/s")
    results = []
    for i, (m, k) in enumerate(SHAPES, 1):
        gemm = Gemm(kernels, m, k)
        for tokens in TOKENS:
            results.append(measure(gemm, tokens, started + args.seconds * i / len(SHAPES)))
            show(results[-1], bandwidth)
    if args.json:
        record = {"device": name, "torch": torch.__version__, "read_tb_per_s": bandwidth, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
