"""Records op calls and runs them again as one call (kernels/cpu/program.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmopt import native


def only_ops() -> bool:
    """True where nothing of torch's may stand in for an op: a program is recorded on this thread, or a graph is traced."""
    return torch.compiler.is_compiling() or bool(native.library().recording())


class Program:
    """Op calls with their tensors, to be run again and again.

    A run reads and writes the tensors that were given when it was recorded: what changes from run to run is changed in them.
    The GIL is released meanwhile. Programs of one process run one at a time: concurrent callers take turns, a run each.

    Args:
        calls: makes the op calls, once; only ops of the engine, nothing of torch's. What it returns is kept.
        keep: whatever else holds the tensors alive.
    """

    def __init__(self, calls: Callable[[], object], keep: Any = None) -> None:
        library = native.library()
        library.record_begin()
        try:
            made = calls()
        except BaseException:
            library.record_abort()
            raise
        ended = library.record_end()
        self._run, self._profile = ended["run"], ended["profile"]
        self._keep = keep, made

    def run(self, times: int = 1) -> None:
        """Run it, several times if asked."""
        self._run(times)

    def profile(self, times: int = 1) -> list[tuple[str, float]]:
        """Run it, and tell where the time goes: every call in order, its op and its seconds, the mean of all runs.

        A call's time ends when all threads have done their share.
        """
        return [(str(name), float(seconds)) for name, seconds in self._profile(times)]
