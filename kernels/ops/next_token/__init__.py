"""next_token and advance: the greedy choice, and one step further in every sequence, as parts of a recorded step."""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import by_triton, implementation, registered

__all__ = ["advance", "next_token"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define("next_token(Tensor logits, Tensor(a!) ids) -> ()")


def next_token(logits: torch.Tensor, ids: torch.Tensor) -> None:
    """``ids[t] = argmax(logits[t])``: the first of equals; a NaN is the largest, as for ``torch.argmax``.

    Args:
        logits: ``[T, V]`` float32.
        ids: ``[T]`` int64, written.

    Raises:
        InputError: shapes or dtypes do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if torch.compiler.is_compiling():
        torch.ops.llmopt.next_token(logits, ids)
    else:
        implementation("next_token", _cpu, logits)(logits, ids)


def _cpu(logits: torch.Tensor, ids: torch.Tensor) -> None:
    try:
        native.library().next_token(logits, ids)
    except ValueError as error:
        raise InputError(f"next_token: {error}") from None


def _fake(logits: torch.Tensor, ids: torch.Tensor) -> None:
    torch._check(logits.shape[0] == ids.shape[0], lambda: f"ids: expected {logits.shape[0]}, got {ids.shape[0]}")


_LIBRARY.impl("next_token", _cpu, "CPU")
_LIBRARY.impl("next_token", registered("next_token"), "CUDA")
torch.library.register_fake("llmopt::next_token", _fake, lib=_LIBRARY)


def advance(position: torch.Tensor, slot: torch.Tensor) -> None:
    """Add one to both, in place.

    Args:
        position: ``[T]`` int32.
        slot: ``[T]`` int32.

    Raises:
        InputError: shapes or dtypes do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if by_triton(position):
        position += 1
        slot += 1
        return
    try:
        native.library().advance(position, slot)
    except ValueError as error:
        raise InputError(f"advance: {error}") from None
