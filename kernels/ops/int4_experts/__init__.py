"""int4_experts: a mixture-of-experts block's routed experts, fused and int4 at run time.

transformers 5 keeps experts as 3-D parameters ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``; so does this op, in
the packed layout of int4_linear with a leading expert dimension. Tokens are grouped by expert; the two products are task
lists over (expert, tiles), so that one token's few experts keep all threads busy.
"""

from __future__ import annotations

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered
from llmopt.ops.int4_linear.layout import check_indices

__all__ = ["int4_experts"]

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "int4_experts(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, int intermediate, "
    "int group_size, int down_group_size, bool asymmetric) -> Tensor"
)


def int4_experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    intermediate: int,
    group_size: int,
    down_group_size: int,
    asymmetric: bool = False,
) -> torch.Tensor:
    """``out[t] = sum_j weights[t, j] * down[e](silu(gate[e](x[t])) * up[e](x[t]))`` with ``e = index[t, j]``.

    Args:
        x: ``[T, H]`` float32, bfloat16 or float16.
        index: ``[T, k]`` of any integer dtype, experts chosen for each token, in ``[0, E)``.
        weights: ``[T, k]`` floating, the router's weights.
        gate_up: ``[E, tiles, bytes]`` uint8, packed ``[2I, H]`` an expert.
        down: ``[E, tiles, bytes]`` uint8, packed ``[H, I]`` an expert.
        intermediate: I.
        group_size: of gate_up, along H.
        down_group_size: of down, along I.
        asymmetric: both carry zero points.

    Returns:
        ``[T, H]`` of x's dtype.

    Raises:
        InputError: shapes or dtypes do not fit together.
        IndexError: an expert index is out of range.
        NativeLibraryError: the compiled kernels are not installed.
    """
    args = (x, index, weights, gate_up, down, intermediate, group_size, down_group_size, asymmetric)
    if torch.compiler.is_compiling():
        y: torch.Tensor = torch.ops.llmopt.int4_experts(*args)
        return y
    return implementation("int4_experts", _cpu, x)(*args)


def _cpu(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    intermediate: int, group_size: int, down_group_size: int, asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    check_indices("index", index)
    if x.dim() == 2 and x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    try:
        native.library().int4_experts(
            x, index.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous(), gate_up, down, out,
            intermediate, group_size, down_group_size, asymmetric,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"int4_experts: {error}") from None
    return out


def _fake(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    intermediate: int, group_size: int, down_group_size: int, asymmetric: bool,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape)


_LIBRARY.impl("int4_experts", _cpu, "CPU")
_LIBRARY.impl("int4_experts", registered("int4_experts"), "CUDA")
torch.library.register_fake("llmopt::int4_experts", _fake, lib=_LIBRARY)
