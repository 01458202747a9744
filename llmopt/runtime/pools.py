"""Pools of a GPU's memory, one for each lifetime: what graphs use, caches, weights."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# One capture of a process at a time, and no pool taken down meanwhile: torch ends the process where it finds a capture under
# way then (pytorch issue 159301). Reentrant, for a capture may make a cache.
CAPTURING = threading.RLock()


class _Captures:
    """Whether a capture of this process has failed: torch, until 2.12, takes it for one under way ever after."""

    failed = False


@contextmanager
def capturing() -> Iterator[None]:
    """A graph is captured meanwhile, by this thread alone."""
    with CAPTURING:
        try:
            yield
        except BaseException:
            _Captures.failed = True
            raise


class GraphMemory:
    """Memory that CUDA graphs share, which do not run at once: those of one engine's steps.

    Args:
        others_allocate: something else than torch asks the driver for memory while a step is captured, which keeps it.
    """

    def __init__(self, *, others_allocate: bool = False) -> None:
        self.others_allocate = others_allocate
        self._pool: Any = None
        self._living: weakref.WeakSet[Any] = weakref.WeakSet()

    def pool(self) -> Any:
        """As ``torch.cuda.graph`` takes it: that of the graphs which live; call it under :data:`CAPTURING`.

        torch refuses a pool whose last graph is gone while something in it is not (cuBLAS's workspace), so the next graph
        gets one of its own.
        """
        if not self._living:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def lives(self, graph: Any) -> None:
        """A graph has been captured into the pool."""
        self._living.add(graph)


@contextmanager
def pool_of_its_own(device: torch.device) -> Iterator[None]:
    """What this thread allocates on a GPU meanwhile lies in a pool of its own: what stays does not lie between what goes.

    torch keeps the pool as long as it holds any; then its memory can go back to the driver. After a capture that failed there
    are no such pools any more: their end would be the process's.
    """
    if device.type != "cuda" or _Captures.failed:
        yield
        return
    with CAPTURING:
        pool = torch.cuda.MemPool()
        try:
            with torch.cuda.use_mem_pool(pool, device):
                yield
        finally:
            del pool
