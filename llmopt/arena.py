"""Memory for packed weights: one block, in the order of execution, in huge pages where the system gives them.

A decode step streams every weight once. On pages of 4 KiB the walks through the page tables cost about a tenth of the
read bandwidth, and PyTorch's allocator does not ask for larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import torch
from torch import nn

from llmopt import native
from llmopt.models.base import ResolvedModel

_HUGE_PAGE = 2 << 20
ALIGNMENT = 64
_PIECE = 8 * _HUGE_PAGE
# below this a model's weights may stay in the caches, and rounding up to huge pages shows
SMALL_BYTES = 64 << 20


class WeightArena:
    """Hands out uint8 tensors from one block. What does not fit, and small models, get tensors of their own.

    Args:
        capacity: bytes that will be asked for, or a bound on it: what is never written to takes no memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self._used = capacity, 0
        self._block: torch.Tensor | None = None

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialized uint8 tensor on the CPU."""
        size = math.prod(shape)
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if self.capacity < SMALL_BYTES or start + size > self.capacity:
            return torch.empty(shape, dtype=torch.uint8, device="cpu")
        if self._block is None:
            self._block = huge_block(self.capacity)
        self._used = start + size
        return self._block[start : self._used].view(shape)

    @contextmanager
    def populated(self, size: int) -> Iterator[None]:
        """Meanwhile a thread gets memory for the first ``size`` bytes, from the last to what has been handed out.

        Where a virtual machine asks its host for every huge page, that takes ten times as long as filling them; whoever
        fills them from the front and this thread from the back ask side by side. What is written is kept.
        """
        if self.capacity < SMALL_BYTES or not native.available():
            yield
            return
        if self._block is None:
            self._block = huge_block(self.capacity)
        block, over = self._block, Event()

        def populate() -> None:
            for start in reversed(range(0, min(size, self.capacity), _PIECE)):
                if over.is_set() or start < self._used:
                    return
                native.library().populate_pages(block[start : min(start + _PIECE, size)])

        thread = Thread(target=populate, name="llmopt-arena")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a uint8 CPU tensor in the block; others, and what lies there already, come back as they are."""
        if tensor.device.type != "cpu" or tensor.dtype != torch.uint8 or self._holds(tensor):
            return tensor
        place = self.take(tuple(tensor.shape))
        return place.copy_(tensor) if self._holds(place) else tensor

    def adopt(self, module: nn.Module) -> None:
        """Move the packed buffers of a module, and of its children, into the block."""
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.dtype == torch.uint8:
                    part._buffers[name] = self.place(buffer)

    def _holds(self, tensor: torch.Tensor) -> bool:
        return (
            self._block is not None
            and tensor.untyped_storage().data_ptr() == self._block.untyped_storage().data_ptr()
        )  # fmt: skip


def huge_block(size: int) -> torch.Tensor:
    """Uninitialized uint8 memory that begins on a huge page, and takes no memory until written to."""
    block = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
    if native.available():
        native.library().advise_huge_pages(block)
    start = -block.data_ptr() % _HUGE_PAGE
    return block[start : start + size]


def arena_for(resolved: ResolvedModel) -> WeightArena:
    """An arena for a model that is about to be quantized: 4 bits (8 for head and embedding), scales and zeros."""
    weights = [site.module.weight for layer in resolved.layers for site in layer.linears()]
    for layer in resolved.layers:
        if layer.experts is not None:
            weights += [layer.experts.gate_up, layer.experts.down]
    tables = [resolved.embedding.weight] + ([] if resolved.tied else [resolved.head.module.weight])
    return WeightArena(sum(int(w.numel() * 4.75 / 8) for w in weights) + sum(int(w.numel() * 8.25 / 8) for w in tables))
