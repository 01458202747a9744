"""int8_linear and quant_rows: the output head and the embedding at 8 bits, on one copy of the bytes.

The layout is that of int4_linear (:mod:`llmopt.ops.int4_linear.layout`) with ``bits=8``: symmetric, stored plus 128.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered
from llmopt.ops.int4_linear.layout import check_indices, packed_shape

__all__ = ["int8_linear", "quant_rows"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define("int8_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size) -> Tensor")


def int8_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None, *, out_features: int, group_size: int
) -> torch.Tensor:
    """``x [..., K] @ dequantize(packed).T + bias``, 8-bit weights, activations int8 per token and group.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        packed: ``[T, tile_bytes]`` uint8 from :func:`layout.pack` with ``bits=8``.
        bias: ``[out_features]`` of x's dtype, or None.
        out_features: rows of the weight.
        group_size: 32, 64 or 128.

    Returns:
        ``[..., out_features]`` of x's dtype.

    Raises:
        InputError: shapes or dtypes do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if torch.compiler.is_compiling():
        y: torch.Tensor = torch.ops.llmopt.int8_linear(x, packed, bias, out_features, group_size)
        return y
    return implementation("int8_linear", _cpu, x)(x, packed, bias, out_features, group_size)


def _cpu(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, group_size: int
) -> torch.Tensor:
    if not x.is_contiguous() and (x.dim() != 2 or x.stride(1) != 1):
        x = x.contiguous()
    try:
        y: torch.Tensor = native.library().int8_linear(x, packed, bias, out_features, group_size)
    except ValueError as error:
        raise InputError(f"int8_linear: {error}") from None
    return y


def _fake(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, group_size: int
) -> torch.Tensor:
    want = packed_shape(out_features, x.shape[-1], group_size, bits=8, asymmetric=False)
    torch._check(tuple(packed.shape) == want, lambda: f"packed: expected shape {want}, got {tuple(packed.shape)}")
    return x.new_empty(*x.shape[:-1], out_features)


_LIBRARY.impl("int8_linear", _cpu, "CPU")
_LIBRARY.impl("int8_linear", registered("int8_linear"), "CUDA")
torch.library.register_fake("llmopt::int8_linear", _fake, lib=_LIBRARY)


_LIBRARY.define(
    "quant_rows(Tensor ids, Tensor packed, int out_features, int in_features, int group_size, int bits, "
    "bool asymmetric) -> Tensor"
)


def quant_rows(
    ids: torch.Tensor, packed: torch.Tensor, *, out_features: int, in_features: int, group_size: int, bits: int,
    asymmetric: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rows of a packed weight, dequantized: the embedding lookup.

    Args:
        ids: ``[...]`` of any integer dtype, in ``[0, out_features)``.
        packed: ``[T, tile_bytes]`` uint8 from :func:`layout.pack`.
        out_features: rows of the weight (entries of the table).
        in_features: columns.
        group_size: 32, 64 or 128.
        bits: 4 or 8.
        asymmetric: the packed weight carries zero points.

    Returns:
        ``[..., in_features]`` float32.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: an id is out of range.
        NativeLibraryError: the compiled kernels are not installed.
    """
    args = (ids, packed, out_features, in_features, group_size, bits, asymmetric)
    if torch.compiler.is_compiling():
        y: torch.Tensor = torch.ops.llmopt.quant_rows(*args)
        return y
    return implementation("int8_linear", _rows_cpu, packed, "rows")(*args)


def _rows_cpu(
    ids: torch.Tensor, packed: torch.Tensor, out_features: int, in_features: int, group_size: int, bits: int,
    asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    check_indices("ids", ids)
    if in_features < 1:
        raise InputError.argument("in_features", expected="at least 1", got=in_features)
    y = torch.empty(ids.numel(), in_features, dtype=torch.float32)
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    try:
        native.library().quant_rows(flat, packed, y, out_features, group_size, bits, asymmetric)
    except ValueError as error:
        raise InputError(f"quant_rows: {error}") from None
    return y.view(*ids.shape, in_features)


def _rows_fake(
    ids: torch.Tensor, packed: torch.Tensor, out_features: int, in_features: int, group_size: int, bits: int,
    asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    return ids.new_empty(*ids.shape, in_features, dtype=torch.float32)


_LIBRARY.impl("quant_rows", _rows_cpu, "CPU")
_LIBRARY.impl("quant_rows", registered("int8_linear", "rows"), "CUDA")
torch.library.register_fake("llmopt::quant_rows", _rows_fake, lib=_LIBRARY)
