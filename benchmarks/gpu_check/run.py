"""One run of the check: its device, the time that is left, and what has been found."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def failures() -> tuple[type[Exception], ...]:
    """What torch, TVM and Triton raise where something does not fit."""
    # imported late: whether it interprets its kernels, Triton asks when it is imported
    from triton.errors import TritonError

    return RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, TritonError


class WrongAnswerError(AssertionError):
    """A kernel or a model gave something else than its reference."""


class Run:
    """The device, the time that is left, and what has been found.

    Args:
        interpret: by Triton's interpreter, on the CPU.
        quick: small cases alone.
        seconds: for all of it.
        written: called after every step: whoever is cut off keeps what there is.
    """

    def __init__(
        self, *, interpret: bool, quick: bool, seconds: float, written: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.interpret, self.quick = interpret, quick
        self.device = torch.device("cpu" if interpret else "cuda")
        self.end = time.perf_counter() + seconds
        self.found: dict[str, Any] = {"steps": {}, "left_out": []}
        self._written = written

    def left(self) -> float:
        return self.end - time.perf_counter()

    def kernels(self) -> AbstractContextManager[None]:
        """Ops by Triton, wherever the tensors lie."""
        from llmopt.ops.device import interpreting

        return interpreting() if self.interpret else nullcontext()

    def step(self, name: str, least_s: float, work: Callable[[Run], Any]) -> None:
        """Do it if ``least_s`` seconds are left; a wrong answer ends the run."""
        if self.left() < least_s:
            self.found["left_out"].append(name)
            return
        began = time.perf_counter()
        try:
            with torch.no_grad():
                self.found["steps"][name] = work(self)
        except failures() as error:
            self.found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        if self._written is not None:
            self._written(self.found)
