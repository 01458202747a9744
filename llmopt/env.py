"""The only place that reads environment variables.

LLMOPT_ISA       portable | avx2 | avx512 | amx   force the CPU kernels to one instruction set (default: the best)
LLMOPT_LIBRARY   path                             load this kernel library instead of the installed one
LLMOPT_CACHE     path                             where compiled libraries are kept (default: ~/.cache/llmopt)

PYTORCH_ALLOC_CONF, torch's own, is only looked at; TVM_CUDA_COMPILE_MODE, TVM's, is set where it is not and NVRTC is missing.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

from llmopt.errors import InputError

ISA_NAMES = ("portable", "avx2", "avx512", "amx")


def forced_isa() -> str | None:
    """Instruction set asked for by LLMOPT_ISA, or None."""
    value = os.environ.get("LLMOPT_ISA")
    if not value:
        return None
    if value not in ISA_NAMES:
        raise InputError.argument("LLMOPT_ISA", expected=" | ".join(ISA_NAMES), got=value)
    return value


def library_override() -> Path | None:
    """Kernel library path asked for by LLMOPT_LIBRARY, or None."""
    value = os.environ.get("LLMOPT_LIBRARY")
    return Path(value) if value else None


def cache_folder() -> Path:
    """Where things are kept that can be made again: LLMOPT_CACHE, or as the XDG base directories have it."""
    value = os.environ.get("LLMOPT_CACHE")
    if value:
        return Path(value).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "llmopt"


def cuda_allocator_options() -> str | None:
    """PYTORCH_ALLOC_CONF, or PYTORCH_CUDA_ALLOC_CONF: torch's own, given to the process."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or None


def tvm_without_cuda_compiler() -> str:
    """Why TVM cannot compile for a GPU, or ''. It takes NVRTC by itself; where that is missing it is told to take nvcc."""
    given = os.environ.get("TVM_CUDA_COMPILE_MODE", "").lower()
    if given != "nvcc" and _importable("cuda.bindings.nvrtc"):
        return ""
    if given == "nvrtc" or shutil.which("nvcc") is None:
        return "needs NVRTC (pip install cuda-bindings) or nvcc"
    os.environ.setdefault("TVM_CUDA_COMPILE_MODE", "nvcc")
    return ""


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):  # missing, or without its library
        return False
    return True
