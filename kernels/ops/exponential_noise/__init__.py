"""exponential_noise: ``Tensor.exponential_`` on the CPU, the same values from the same generator, in a fraction of the time.

torch draws one value after the other: for a large vocabulary a good part of a small model's decode step (decision 0018).
"""

from __future__ import annotations

import functools
import os
import threading

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.exponential_noise import reference

__all__ = ["exponential_noise"]

# a generator's state is read and written back: two callers in between would draw the same
_DRAWING = threading.Lock()
# nobody would release it in a child that was forked meanwhile
os.register_at_fork(before=_DRAWING.acquire, after_in_parent=_DRAWING.release, after_in_child=_DRAWING.release)


def exponential_noise(out: torch.Tensor, generator: torch.Generator) -> None:
    """Fill ``out`` as ``out.exponential_(generator=generator)`` does, and leave the generator where that leaves it.

    Values differ from torch's by roundings. Where this torch draws in another way, which is tried once, torch itself is called;
    so it is on other devices. Callers in several threads draw one after the other; who draws from the same generator by other
    means meanwhile may get the same values.

    Args:
        out: float32, contiguous.
        generator: of the device of ``out``.

    Raises:
        InputError: ``out`` is of another dtype, or not contiguous.
    """
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise InputError.argument("exponential_noise: out", expected="float32, contiguous", got=out.dtype)
    if out.device.type != "cpu" or not native.available() or not _as_torch():
        reference.exponential_noise(out, generator)
        return
    with _DRAWING:
        _draw(out, generator)


def _draw(out: torch.Tensor, generator: torch.Generator) -> None:
    state = generator.get_state()
    native.library().exponential_noise(state, out)
    generator.set_state(state)


@functools.cache
def _as_torch() -> bool:
    """True where this torch draws from a generator's state as we do."""
    ours, torchs = (torch.Generator().manual_seed(9) for _ in range(2))
    for size in (3, 1001, 500):
        got, expected = torch.empty(size), torch.empty(size)
        try:
            _draw(got, ours)
        except ValueError:
            return False
        reference.exponential_noise(expected, torchs)
        if not torch.allclose(got, expected, rtol=1e-5, atol=0) or not torch.equal(
            ours.get_state(), torchs.get_state()
        ):
            return False
    return True
