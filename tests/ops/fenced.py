"""Tensors that lie against pages which may not be touched: a byte too many ends the process, so use one of its own."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

PAGE = mmap.PAGESIZE
KEEP: list[mmap.mmap] = []  # memory of the tensors in use
_libc = ctypes.CDLL(None, use_errno=True)


def fenced(x: torch.Tensor, *, at_end: bool) -> torch.Tensor:
    """A copy between two such pages, right before the second one if ``at_end``, else right behind the first."""
    size = x.numel() * x.element_size()
    inner = -(-max(size, 1) // PAGE) * PAGE
    area = mmap.mmap(-1, inner + 2 * PAGE)
    KEEP.append(area)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (base, base + PAGE + inner):
        assert _libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    if size == 0:
        return x
    start = PAGE + (inner - size if at_end else 0)
    view = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    view.copy_(x)
    return view


def run(script: str, isas: Sequence[str]) -> None:
    """Run a script, which finds the instruction sets in ``sys.argv[2:]``, says where it is, and ends with "done"."""
    command = [
        sys.executable,
        "-c",
        f"import sys\nsys.path.insert(0, sys.argv[1])\n{script}",
        str(Path(__file__).parent),
    ]
    ran = subprocess.run([*command, *isas], capture_output=True, text=True, check=False)
    lines = ran.stdout.splitlines() or ["nothing"]
    assert ran.returncode == 0, f"after {lines[-1]}: {ran.stderr[-2000:]}"
    assert lines[-1] == "done"
