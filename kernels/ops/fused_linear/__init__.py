"""fused_linear: RMSNorm, one to four linears that share their input, and what follows them, as one op.

What follows is nothing, a residual addition, or SwiGLU. Weights may be packed (4 or 8 bits; activations are then quantized to
int8 per token and group, once for all weights) or plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered

__all__ = ["MODES", "Weight", "fused_linear"]

Mode = Literal["store", "add", "swiglu"]
MODES: dict[Mode, int] = {"store": 0, "add": 1, "swiglu": 2}

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
# not "mode": an argument of that name gets in torch's way when it functionalizes the op
_LIBRARY.define(
    "fused_linear(Tensor x, Tensor? norm, float eps, Tensor[] weights, int[] rows, int[] bits, int[] asymmetric, "
    "int group_size, Tensor[]? biases, int epilogue, Tensor(a!) out) -> ()"
)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight ``[rows, cols]``, packed or plain.

    Args:
        data: packed ``[tiles, bytes]`` uint8 (:mod:`llmopt.ops.int4_linear.layout`), or ``[rows, cols]`` floating.
        rows: out_features.
        cols: in_features.
        bits: 4 or 8 (packed), 16 or 32 (plain).
        group_size: of a packed weight: 32, 64 or 128.
        asymmetric: the packed weight carries zero points.
        bias: ``[rows]`` float32, or None.
    """

    data: torch.Tensor
    rows: int
    cols: int
    bits: int
    group_size: int = 128
    asymmetric: bool = False
    bias: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        """True for 4 and 8 bits."""
        return self.bits <= 8


def fused_linear(
    x: torch.Tensor, weights: Sequence[Weight], out: torch.Tensor, *, norm: torch.Tensor | None = None,
    eps: float = 0.0, mode: Mode = "store",
) -> None:  # fmt: skip
    """``out = f(norm(x) @ weights.T + biases)``, in one pass over the weights.

    Args:
        x: ``[T, K]`` float32, bfloat16 or float16; the last dimension dense.
        weights: one to four of in_features K; those that are packed have one group size, those that are not one dtype.
        out: ``[T, sum of rows]`` float32, written ("store") or added to ("add"); "swiglu": ``[T, rows]``, takes
            ``silu(x @ weights[0].T) * (x @ weights[1].T)``.
        norm: ``[K]`` float32 weight of an RMSNorm before the products, or None.
        eps: of the norm.
        mode: what becomes of the products.

    Raises:
        InputError: shapes or dtypes do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    if mode not in MODES:
        raise InputError.argument("fused_linear: mode", expected=" | ".join(MODES), got=mode)
    cols = {w.cols for w in weights}
    if x.dim() == 2 and cols - {x.shape[1]}:
        raise InputError.argument("fused_linear: weights", expected=f"x's {x.shape[1]} columns", got=sorted(cols))
    sizes = {w.group_size for w in weights if w.packed}
    if len(sizes) > 1:
        raise InputError.argument("fused_linear: weights", expected="one group size", got=sorted(sizes))
    biases = None
    if any(w.bias is not None for w in weights):
        biases = [torch.zeros(w.rows, device=x.device) if w.bias is None else w.bias for w in weights]
    args = (
        x, norm, eps, [w.data for w in weights], [w.rows for w in weights], [w.bits for w in weights],
        [int(w.asymmetric) for w in weights], max(sizes, default=128), biases, MODES[mode], out,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        torch.ops.llmopt.fused_linear(*args)
    else:
        implementation("fused_linear", _cpu, x)(*args)


def _cpu(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, weights: list[torch.Tensor], rows: list[int],
    bits: list[int], asymmetric: list[int], group_size: int, biases: list[torch.Tensor] | None, epilogue: int,
    out: torch.Tensor,
) -> None:  # fmt: skip
    try:
        native.library().fused_linear(
            x, norm, eps, weights, rows, bits, asymmetric, group_size, biases, epilogue, out
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"fused_linear: {error}") from None


def _fake(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, weights: list[torch.Tensor], rows: list[int],
    bits: list[int], asymmetric: list[int], group_size: int, biases: list[torch.Tensor] | None, epilogue: int,
    out: torch.Tensor,
) -> None:  # fmt: skip
    width = rows[0] if epilogue == MODES["swiglu"] else sum(rows)
    torch._check(out.shape == (x.shape[0], width), lambda: f"out: expected shape {(x.shape[0], width)}")


_LIBRARY.impl("fused_linear", _cpu, "CPU")
_LIBRARY.impl("fused_linear", registered("fused_linear"), "CUDA")
torch.library.register_fake("llmopt::fused_linear", _fake, lib=_LIBRARY)
