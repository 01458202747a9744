"""Pools of a GPU's memory, one for each lifetime: what graphs use, caches, weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class GraphMemory:
    """Memory that CUDA graphs share, which do not run at once: those of one engine's steps.

    Args:
        others_allocate: something else than torch asks the driver for memory while a step is captured, which keeps it.
    """

    def __init__(self, *, others_allocate: bool = False) -> None:
        self.others_allocate = others_allocate

    @functools.cached_property
    def pool(self) -> Any:
        """As ``torch.cuda.graph`` takes it."""
        return torch.cuda.graph_pool_handle()


@contextmanager
def pool_of_its_own(device: torch.device) -> Iterator[None]:
    """What this thread allocates on a GPU meanwhile lies in a pool of its own: what stays does not lie between what goes.

    torch keeps the pool as long as it holds any; then its memory can go back to the driver.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.use_mem_pool(torch.cuda.MemPool(), device):
        yield
