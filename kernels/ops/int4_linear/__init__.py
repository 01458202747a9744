"""int4_linear: ``y = x @ dequantize(packed).T + bias`` with 4-bit weights and int8 activations (W4A8).

GPTQ-style groups along in_features, one float16 scale (and, asymmetric, one zero point) per row and group. One packed
layout (:mod:`llmopt.ops.int4_linear.layout`) serves one row (decode) and many (prefill). Activations are quantized inside,
with a scale and a zero point per token and group.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered
from llmopt.ops.int4_linear.layout import packed_shape

__all__ = ["int4_linear"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "int4_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size, bool asymmetric) -> Tensor"
)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    group_size: int,
    asymmetric: bool = False,
) -> torch.Tensor:
    """Multiply activations with a packed 4-bit weight.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16; the last dimension dense.
        packed: ``[T, tile_bytes]`` uint8 from :func:`layout.pack`, T tiles of 16 rows.
        bias: ``[out_features]`` of x's dtype, or None.
        out_features: rows of the weight.
        group_size: 32, 64 or 128.
        asymmetric: the packed weight carries zero points.

    Returns:
        ``[..., out_features]`` of x's dtype.

    Raises:
        InputError: shapes or dtypes do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if torch.compiler.is_compiling():
        y: torch.Tensor = torch.ops.llmopt.int4_linear(x, packed, bias, out_features, group_size, asymmetric)
        return y
    return implementation("int4_linear", _cpu, x)(x, packed, bias, out_features, group_size, asymmetric)


def _cpu(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, group_size: int,
    asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    if not x.is_contiguous() and (x.dim() != 2 or x.stride(1) != 1):
        x = x.contiguous()
    try:
        y: torch.Tensor = native.library().int4_linear(x, packed, bias, out_features, group_size, asymmetric)
    except ValueError as error:
        raise InputError(f"int4_linear: {error}") from None
    return y


def _fake(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, group_size: int,
    asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    want = packed_shape(out_features, x.shape[-1], group_size, bits=4, asymmetric=asymmetric)
    torch._check(tuple(packed.shape) == want, lambda: f"packed: expected shape {want}, got {tuple(packed.shape)}")
    return x.new_empty(*x.shape[:-1], out_features)


_LIBRARY.impl("int4_linear", _cpu, "CPU")
_LIBRARY.impl("int4_linear", registered("int4_linear"), "CUDA")
torch.library.register_fake("llmopt::int4_linear", _fake, lib=_LIBRARY)
