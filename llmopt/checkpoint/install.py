"""Reading tensors into their final form and place, with their values checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from llmopt.checkpoint import requantize
from llmopt.checkpoint.experts import ExpertLinears
from llmopt.checkpoint.gptq_source import GptqSource, pack_together
from llmopt.checkpoint.manifest import Requantized
from llmopt.checkpoint.shard_reader import Shard
from llmopt.errors import CheckpointError, InputError
from llmopt.packed import QuantExperts, QuantLinear, kernel_group_size

_BLOCK_VALUES = 2**21
Take = Callable[[tuple[int, ...]], torch.Tensor]  # uint8 memory of a shape, for packed weights


def read_plain(shard: Shard, name: str, dtype: torch.dtype) -> torch.Tensor:
    """An unquantized tensor as ``dtype``, a block of rows at a time.

    Raises:
        CheckpointError: it holds NaN or Inf.
    """
    info = shard.tensors[name]
    result = torch.empty(info.shape, dtype=dtype)
    if not info.shape:
        return result.copy_(checked(shard, name, shard.read(name)))
    for start, stop in _row_blocks(info.shape):
        result[start:stop] = checked(shard, name, shard.read_rows(name, start, stop))
    return result


def checked(shard: Shard, name: str, values: torch.Tensor) -> torch.Tensor:
    """The same values, which must be finite."""
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{shard.path}: {name}: expected finite values, got NaN or Inf")
    return values


def same_values(one: tuple[Shard, str], other: tuple[Shard, str]) -> bool:
    """True when two tensors of the same shape hold the same values."""
    shape = one[0].tensors[one[1]].shape
    return all(
        torch.equal(one[0].read_rows(one[1], a, b).float(), other[0].read_rows(other[1], a, b).float())
        for a, b in _row_blocks(shape)
    )


def read_linear(source: GptqSource, bias: torch.Tensor | None, take: Take) -> QuantLinear:
    """A quantized linear as a module."""
    form = source.form
    packed = take(source.packed_shape(form.out_features))
    source.pack(packed)
    return QuantLinear(
        packed, bias, in_features=form.in_features, out_features=form.out_features, bits=form.bits,
        group_size=source.group_size, asymmetric=source.asymmetric, perm=source.perm,
    )  # fmt: skip


def fuse_experts(make: Callable[[int], Sequence[GptqSource]], count: int, take: Take) -> QuantExperts:
    """Experts with one common layout as the fused module.

    Args:
        make: an expert's gate, up and down.
        count: number of experts.
        take: gives memory.
    """
    gate_up, down = torch.empty(0), torch.empty(0)
    for expert in range(count):
        gate, up, low = make(expert)
        inner = gate.form.out_features
        if expert == 0:
            gate_up = take((count, *gate.packed_shape(2 * inner)))
            down = take((count, *low.packed_shape(low.form.out_features)))
        # gate and up are one weight [2I, H]: a tile may hold rows of both
        pack_together([gate, up], gate_up[expert])
        low.pack(down[expert])
    return QuantExperts(
        gate_up, down, hidden_dim=gate.form.in_features, intermediate_dim=inner, group_size=gate.group_size,
        asymmetric=gate.asymmetric,
    )  # fmt: skip


def separate_experts(make: Callable[[int], Sequence[GptqSource]], count: int, take: Take) -> ExpertLinears:
    """Experts that the fused module cannot hold, as a linear each."""
    linears = [[read_linear(source, None, take) for source in make(expert)] for expert in range(count)]
    gate, up, down = zip(*linears, strict=True)
    return ExpertLinears(gate, up, down)


def read_grid(scales: Shard, record: Requantized, out_features: int, in_features: int) -> requantize.Grid:
    """Scales, zeros and column order of a head or embedding, from ``llmopt.scales``.

    Raises:
        CheckpointError: missing, of the wrong shape or dtype, or with values that cannot be.
    """
    group = kernel_group_size(in_features, record.group_size)
    groups = -(-in_features // group)

    def part(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        full = f"{record.scales}.{name}"
        info = scales.tensors.get(full)
        if info is None or info.shape != shape or info.dtype != dtype:
            got = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(f"{scales.path}: {full}: expected {dtype} {list(shape)}, got {got}")
        return scales.read(full)

    s = part("scales", (out_features, groups), torch.float16)
    if not bool((torch.isfinite(s) & (s != 0)).all()):
        raise CheckpointError(f"{scales.path}: {record.scales}.scales: expected finite scales other than 0")
    zeros = part("zeros", (out_features, groups), torch.uint8) if record.asymmetric else None
    perm = part("perm", (in_features,), torch.int64) if record.permuted else None
    if perm is not None and not torch.equal(perm.sort().values, torch.arange(in_features)):
        raise CheckpointError(f"{scales.path}: {record.scales}.perm: expected a permutation of 0..{in_features - 1}")
    return requantize.Grid(s, zeros, perm, out_features, in_features, record.bits, group)


def requantized_bytes(shard: Shard, tensor: str, grid: requantize.Grid, take: Take) -> torch.Tensor:
    """A tensor quantized again with its saved scales.

    Raises:
        CheckpointError: it holds NaN or Inf.
    """
    packed = take(requantize.packed_shape(grid))
    try:
        requantize.pack_rows(lambda start, stop: shard.read_rows(tensor, start, stop), grid, packed)
    except InputError:
        # shapes and dtypes have been checked, values are what is left
        raise CheckpointError(f"{shard.path}: {tensor}: expected finite values, got NaN or Inf") from None
    return packed


def requantized_linear(
    packed: torch.Tensor, module: nn.Linear, record: Requantized, perm: torch.Tensor | None
) -> QuantLinear:
    """The packed head that takes a linear's place; its bias, if any, is still to be read."""
    bias = None if module.bias is None else torch.empty(module.out_features, dtype=module.bias.dtype)
    return QuantLinear(
        packed, bias, in_features=module.in_features, out_features=module.out_features, bits=record.bits,
        group_size=record.group_size, asymmetric=record.asymmetric, perm=perm,
    )  # fmt: skip


def put(model: nn.Module, name: str, value: nn.Module | torch.Tensor) -> None:
    """Set a module, parameter or buffer by its full name."""
    path, _, attr = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(value, torch.Tensor) and attr in parent._parameters:
        value = nn.Parameter(value, requires_grad=False)
    elif isinstance(value, nn.Module):
        value.eval()
    setattr(parent, attr, value)


def _row_blocks(shape: Sequence[int]) -> list[tuple[int, int]]:
    row = 1
    for size in shape[1:]:
        row *= size
    step = max(1, _BLOCK_VALUES // max(row, 1))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
