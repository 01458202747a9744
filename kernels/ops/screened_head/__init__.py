"""screened_head: the greedy token of an 8-bit output head, for half of the bytes.

Codes lie as two planes of nibbles. The first plane alone gives all logits in 4 bits, each with a margin for what the second
may add; rows that may reach the best logit known exactly are then scored with all 8 bits, and the largest wins.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.fused_linear import Weight

__all__ = ["MARGIN", "screened_head"]

# Times sqrt(sum over groups of scale^2 * sum of x^2), where x is a token's int8 codes times their scale, before the zero point
# (the sums of the weights take care of that exactly). The low nibbles' deviation from their middle has a standard deviation of
# 4.6 where they are spread evenly, and is 7.5 at most. 7.5 * sqrt(in_features) would cover any pattern, and spare nothing.
MARGIN = 30.0

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "screened_head(Tensor x, Tensor? norm, float eps, Tensor packed, int rows, int group_size, float margin, "
    "Tensor(a!) ids, Tensor(b!)? scored) -> ()"
)


def screened_head(
    x: torch.Tensor, weight: Weight, ids: torch.Tensor, *, norm: torch.Tensor | None = None, eps: float = 0.0,
    margin: float = MARGIN, scored: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """``ids = argmax(norm(x) @ weight.T)``: the first of equals; a NaN is the largest, as for ``torch.argmax``.

    The logits compared are those that fused_linear gives, to the bit. A row is left out only where its 4-bit logit is more
    than the margin under another row's 8-bit logit.

    Args:
        x: ``[T, K]`` float32, bfloat16 or float16; the last dimension dense.
        weight: ``[N, K]`` at 8 bits, symmetric, without bias.
        ids: ``[T]`` int64, written.
        norm: ``[K]`` float32 weight of an RMSNorm before the product, or None.
        eps: of the norm.
        margin: times the root of the sum of squares of a row's scales times the token's codes (see ``MARGIN``).
        scored: ``[T]`` int32, written: tiles of 16 rows that were scored with 8 bits; or None.

    Raises:
        InputError: shapes or dtypes do not fit together, or the weight is not of 8 bits.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if weight.bits != 8 or weight.asymmetric or weight.bias is not None:
        got = f"{weight.bits} bits, asymmetric={weight.asymmetric}, bias={weight.bias is not None}"
        raise InputError.argument("screened_head: weight", expected="8 bits, symmetric, no bias", got=got)
    if x.dim() == 2 and x.shape[1] != weight.cols:
        raise InputError.argument("screened_head: weight", expected=f"x's {x.shape[1]} columns", got=weight.cols)
    args = (x, norm, eps, weight.data, weight.rows, weight.group_size, margin, ids, scored)
    if torch.compiler.is_compiling():
        torch.ops.llmopt.screened_head(*args)
    else:
        _cpu(*args)


def _cpu(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, packed: torch.Tensor, rows: int, group_size: int,
    margin: float, ids: torch.Tensor, scored: torch.Tensor | None,
) -> None:  # fmt: skip
    try:
        native.library().screened_head(x, norm, eps, packed, rows, group_size, margin, ids, scored)
    except ValueError as error:
        raise InputError(f"screened_head: {error}") from None


def _fake(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, packed: torch.Tensor, rows: int, group_size: int,
    margin: float, ids: torch.Tensor, scored: torch.Tensor | None,
) -> None:  # fmt: skip
    torch._check(x.shape[0] == ids.shape[0], lambda: f"ids: expected {x.shape[0]}, got {ids.shape[0]}")


_LIBRARY.impl("screened_head", _cpu, "CPU")
torch.library.register_fake("llmopt::screened_head", _fake, lib=_LIBRARY)
