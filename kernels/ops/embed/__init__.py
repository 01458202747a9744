"""embed: rows of the embedding table, packed or plain, as float32."""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered
from llmopt.ops.fused_linear import Weight

__all__ = ["embed"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define("embed(Tensor ids, Tensor table, int rows, int bits, int group_size, Tensor(a!) out) -> ()")


def embed(ids: torch.Tensor, table: Weight, out: torch.Tensor) -> None:
    """``out[t] = table[ids[t]]``.

    Args:
        ids: ``[T]`` int64, in ``[0, rows)``.
        table: the table ``[rows, H]``; symmetric where packed.
        out: ``[T, H]`` float32, written.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: an id is out of range.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if table.asymmetric:
        raise InputError.argument("embed: table", expected="symmetric", got="asymmetric")
    if out.dim() == 2 and out.shape[1] != table.cols:
        raise InputError.argument("embed: out", expected=f"the table's {table.cols} columns", got=out.shape[1])
    args = (ids, table.data, table.rows, table.bits, table.group_size, out)
    if torch.compiler.is_compiling():
        torch.ops.llmopt.embed(*args)
    else:
        implementation("embed", _cpu, ids)(*args)


def _cpu(ids: torch.Tensor, table: torch.Tensor, rows: int, bits: int, group_size: int, out: torch.Tensor) -> None:
    try:
        native.library().embed(ids, table, rows, bits, group_size, out)
    except ValueError as error:
        raise InputError(f"embed: {error}") from None


def _fake(ids: torch.Tensor, table: torch.Tensor, rows: int, bits: int, group_size: int, out: torch.Tensor) -> None:
    torch._check(out.shape[0] == ids.shape[0], lambda: f"out: expected {ids.shape[0]} rows, got {out.shape[0]}")


_LIBRARY.impl("embed", _cpu, "CPU")
_LIBRARY.impl("embed", registered("embed"), "CUDA")
torch.library.register_fake("llmopt::embed", _fake, lib=_LIBRARY)
