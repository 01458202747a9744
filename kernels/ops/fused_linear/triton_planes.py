"""Tokens as the kernels of fused_linear and moe take them: float16 in eight planes, in pairs of 32 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _prepare(
    x, norm, eps, planes, sums, factor, cols, k8s, x_stride, NORM: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token: normalized, divided by a power of two, in planes; sums of every eight inputs."""
    token = tl.program_id(0).to(tl.int64)
    a, i = tl.arange(0, BLOCK)[:, None], tl.arange(0, 8)[None, :]
    k = a * 8 + i
    v = tl.load(x + token * x_stride + k, mask=k < cols, other=0.0).to(tl.float32)
    if NORM:
        v *= 1.0 / tl.sqrt(tl.sum(v * v) / cols + eps)
        v *= tl.load(norm + k, mask=k < cols, other=0.0)
    top = tl.maximum(tl.max(tl.abs(v)), 1e-30)
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # what is not finite makes the factor NaN, and so the result
    tl.store(factor + token, power / 32 + tl.sum(v * 0))
    half = (v * (32 / power)).to(tl.float16)
    plane, high = (i & 1) + 2 * (i >> 2), (i >> 1) & 1
    tl.store(planes + ((token * 4 + plane) * k8s + a) * 2 + high, half, mask=a < k8s)
    if SUMS:
        a1 = tl.arange(0, BLOCK)
        tl.store(sums + token * k8s + a1, tl.sum(half.to(tl.float32), 1), mask=a1 < k8s)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tokens as the kernels take them.

    Attributes:
        planes: ``[T, 4, K / 8]`` int32, K padded to whole groups.
        sums: ``[T, K / 8]`` float32, of every eight inputs; of asymmetric and 8-bit weights only.
        factor: ``[T]`` float32: an input is ``factor`` times what the planes hold.
    """

    planes: torch.Tensor
    sums: torch.Tensor
    factor: torch.Tensor


def prepare(x: torch.Tensor, norm: torch.Tensor | None, eps: float, group_size: int, *, sums: bool) -> Inputs:
    """``norm(x)`` [T, K], any floating dtype, last dimension dense, for the kernels."""
    tokens, cols = x.shape
    k8s = -(-cols // group_size) * group_size // 8
    planes = torch.empty(tokens, 4, k8s, dtype=torch.int32, device=x.device)
    of_eight = torch.empty(tokens if sums else 0, k8s, device=x.device)
    found = Inputs(planes, of_eight, torch.empty(tokens, device=x.device))
    if tokens:
        _prepare[(tokens,)](
            x, found.factor if norm is None else norm, eps, planes.view(torch.float16), found.sums, found.factor, cols,
            k8s, x.stride(0), norm is not None, sums, triton.next_power_of_2(k8s), num_warps=8 if cols >= 4096 else 4,
        )  # fmt: skip
    return found
