"""Loads the compiled kernel library (C++ through tvm-ffi) and says what is to be had.

The library is optional: without a compiler llmopt installs and runs on PyTorch, and says so. Nothing is loaded at import.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llmopt import env, threads
from llmopt.errors import NativeLibraryError

_FILE = "libllmopt_kernels.so"


def library_path() -> Path | None:
    """Where the kernel library is, or None when this installation was built without a compiler."""
    override = env.library_override()
    if override is not None:
        if not override.is_file():
            raise NativeLibraryError(f"LLMOPT_LIBRARY: no such file: {override}")
        return override
    path = Path(__file__).parent / "lib" / _FILE
    return path if path.is_file() else None


@functools.cache
def library() -> Any:
    """The loaded library; its attributes are the exported kernels.

    Raises:
        NativeLibraryError: there is none, or it cannot be loaded.
    """
    path = library_path()
    if path is None:
        raise NativeLibraryError(
            "the compiled kernels are not part of this installation (no C++ compiler when it was installed); "
            "install g++ and cmake, then reinstall llmopt"
        )
    import torch  # noqa: F401  torch first: kernels then share its libgomp, and so its threads

    try:
        import tvm_ffi

        module = tvm_ffi.load_module(str(path))
    except (RuntimeError, OSError, ImportError) as error:
        raise NativeLibraryError(f"cannot load {path}: {error}") from error
    isa = env.forced_isa()
    if isa is not None:
        module.force_isa(isa)
    threads.one_in_forked_children()
    return module


def available() -> bool:
    """True when kernels can be called."""
    try:
        library()
    except NativeLibraryError:
        return False
    return True


def active_isa() -> str:
    """Instruction set the CPU kernels use: portable | avx2 | avx512 | amx."""
    return str(library().active_isa())


def force_isa(name: str) -> None:
    """Force the CPU kernels to one instruction set, or back to the best with 'auto'."""
    library().force_isa(name)
