"""Every Triton kernel compiled ahead of time, without a GPU: registers, spills and shared memory.

    python -m benchmarks.triton_aot [--arch 80,90,100] [--op attention] [--all] [--json FILE]

Ops are called on the CPU's tensors with a driver that compiles for another machine and launches nothing, so that kernels are
compiled for just the arguments that a GPU would get: in bfloat16, on the shapes of published models that are quickly made, and
with ``--all`` on the small cases too. What spills is an error. Needs Triton, whose ptxas makes the binaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from llmopt.ops import SPECS, device
from llmopt.ops.gptq_round import round_span, search_scales
from llmopt.ops.spec import Case, OpSpec

CPU_ONLY = {"screened_head"}
GPTQ = "gptq_round"
# ops whose published shapes are layers of experts, too large to be made for this
ONLY_SMALL = {"moe", "int4_experts"}
MOST_ELEMENTS = 20_000_000
_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# of a block, in bytes, by compute capability
MOST_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel as ptxas made it; sizes in bytes."""

    op: str
    case: str
    kernel: str
    arch: int
    registers: int
    spilled: int
    shared: int
    warps: int


class _Driver:
    """Stands where Triton's driver of a GPU stands."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Launches compile for ``arch`` and no more; gives each kernel's name and what was made of it."""
    made: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        made.append((self.fn.__name__, compiled))
        return compiled

    triton.runtime.driver.set_active(_Driver(arch))
    # what is in memory was compiled for another kind of GPU
    for kept in gc.get_objects():
        if type(kept) is JITFunction:
            kept.device_caches.clear()
        elif type(kept) is Autotuner:
            kept.cache.clear()
    JITFunction.run, device._interpreting = run, True
    empty = torch.empty
    torch.empty = torch.zeros  # kernels write nothing: what torch reads must be in range
    try:
        yield made
    finally:
        JITFunction.run, device._interpreting, torch.empty = launch, False, empty


def resources(ptx: str, arch: int) -> tuple[int, int]:
    """Registers, and bytes spilled, as ptxas says them."""
    name = f"sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [_PTXAS / "ptxas-blackwell", "-v", f"--gpu-name={name}", source]
        done = subprocess.run([*command, "-o", Path(folder) / "cubin"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stdout}{done.stderr}")
    said = done.stdout + done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    return int(re.findall(r"Used (\d+) registers", said)[-1]), sum(spills)


def cases_of(spec: OpSpec, every: bool) -> Iterator[Case]:
    """The published shapes, or those and the small cases, in bfloat16 where they come in it."""
    for case in spec.cases:
        if case.real or every or spec.name in ONLY_SMALL:
            dtypes = case.params.get("dtypes", spec.tolerance)
            dtype = torch.bfloat16 if torch.bfloat16 in dtypes else next(iter(dtypes))
            yield dataclasses.replace(case, params={**case.params, "dtype": dtype})


def compile_op(spec: OpSpec, arch: int, seen: set[str], *, every: bool = False) -> Iterator[Compiled]:
    """Each kernel of an op that no case before has made."""
    for case in cases_of(spec, every):
        inputs = spec.make_inputs(case, 0)
        if sum(v.numel() for v in inputs.values() if isinstance(v, torch.Tensor)) > MOST_ELEMENTS:
            continue
        with torch.no_grad(), compiling(arch) as made:
            spec.run(**inputs)
        for name, compiled in made:
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            yield _measured(spec.name, case.name, name, compiled, arch)


def compile_gptq(arch: int) -> Iterator[Compiled]:
    """The kernels of GPTQ's solver, which is no op of a forward pass."""
    w, u, ones = torch.zeros(1, 64, 128), torch.zeros(1, 128, 128), torch.ones(1, 64)
    with torch.no_grad(), compiling(arch) as made:
        for symmetric in (True, False):
            search_scales(w, torch.ones(1, 128), bits=4, symmetric=symmetric)
        round_span(w, u, ones, ones, bits=4)
    for name, compiled in made:
        yield _measured("gptq_round", "128 columns", name, compiled, arch)


def _measured(op: str, case: str, name: str, compiled: Any, arch: int) -> Compiled:
    registers, spilled = resources(compiled.asm["ptx"], arch)
    return Compiled(op, case, name, arch, registers, spilled, compiled.metadata.shared, compiled.metadata.num_warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--op", choices=sorted({*SPECS, GPTQ} - CPU_ONLY))
    parser.add_argument("--all", action="store_true", help="the small cases of every op too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[Compiled] = []
    for arch in map(int, args.arch.split(",")):
        seen: set[str] = set()
        names = [args.op] if args.op else [*(name for name in SPECS if name not in CPU_ONLY), GPTQ]
        for name in names:
            every = compile_gptq(arch) if name == GPTQ else compile_op(SPECS[name], arch, seen, every=args.all)
            for made in every:
                found.append(made)
                print(
                    f"sm_{arch} {made.op:<18}{made.kernel:<18}{made.registers:>4} registers {made.spilled:>5} spilled "
                    f"{made.shared:>7} shared {made.warps} warps  {made.case}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(x) for x in found], indent=1) + "\n")
    bad = [x for x in found if x.spilled or x.shared > MOST_SHARED[x.arch]]
    print(f"{len(found)} kernels, {len(bad)} spill or take more shared memory than there is")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
