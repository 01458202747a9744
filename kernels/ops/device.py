"""Which implementation of an op serves its tensors: C++ on the CPU, Triton on an NVIDIA GPU.

A Triton kernel lies beside the op's reference in ``triton_kernel.py``, whose ``run`` takes what the torch op takes. Where
Triton interprets its kernels (``TRITON_INTERPRET=1`` before it is imported) they run on the CPU's tensors too, value by value:
that is how they are tested without a GPU, under :func:`interpreting`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from llmopt import native
from llmopt.errors import NativeLibraryError

__all__ = ["by_triton", "implementation", "interpreting", "kernels_for", "processors", "registered"]

LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores

P = ParamSpec("P")
R = TypeVar("R")

_interpreting = False


def by_triton(tensor: torch.Tensor) -> bool:
    """True where Triton kernels serve this tensor."""
    return tensor.is_cuda or _interpreting


def kernels_for(device: str) -> bool:
    """True where the ops run on a device of this type: the compiled library is there, or Triton and GPUs that it serves."""
    if device == "cuda":
        return _served_gpus()
    return device == "cpu" and native.available()


@functools.cache
def _served_gpus() -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return all(torch.cuda.get_device_capability(i) >= LEAST_CAPABILITY for i in range(torch.cuda.device_count()))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; without one, where kernels are interpreted or compiled ahead, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def implementation(op: str, cpu: Callable[P, R], tensor: torch.Tensor, function: str = "run") -> Callable[P, R]:
    """What runs an op on a tensor: ``cpu``, or a function of its ``triton_kernel.py``.

    Raises:
        NativeLibraryError: Triton is not installed.
    """
    if not by_triton(tensor):
        return cpu
    run = _triton(op, function)
    return _on(tensor.device, run) if tensor.is_cuda else run


def registered(op: str, function: str = "run") -> Callable[..., Any]:
    """What torch calls for an op on a GPU; Triton is imported with the first call."""

    def run(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        return _on(device, _triton(op, function))(*args)

    return run


def _on(device: torch.device, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with a GPU as the current one: that is where Triton launches."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(device):
            return run(*args, **kwargs)

    return guarded


@functools.cache
def _triton(op: str, function: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(f"llmopt.ops.{op}.triton_kernel")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise NativeLibraryError(
            f"{op}: needs Triton on a GPU, which is not installed (pip install llmopt[gpu])"
        ) from None
    found: Callable[..., Any] = getattr(module, function)
    return found


@contextmanager
def interpreting() -> Iterator[None]:
    """Have Triton's interpreter serve the CPU's tensors. For tests, on one thread.

    Raises:
        NativeLibraryError: Triton was imported without ``TRITON_INTERPRET=1``.
    """
    global _interpreting
    import triton

    if not triton.knobs.runtime.interpret:
        raise NativeLibraryError("Triton interprets nothing: TRITON_INTERPRET=1 was not set when it was imported")
    _interpreting = True
    try:
        yield
    finally:
        _interpreting = False
