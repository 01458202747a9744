"""Walks the decoder block by block: gather Hessians, solve, go on with quantized weights.

True sequential order: inside a block, linears that read the same input form a stage; each stage sees inputs made by the
already quantized stages before it, and each block inputs made by the already quantized blocks before it. Only one block's
Hessians exist at a time. The model's own modules are swapped for stand-ins while a block is worked on and put back after:
nothing is changed until the pass's patch is enabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmopt.errors import QuantizationError
from llmopt.models.base import LinearSite, ResolvedModel

# tokens of one forward pass through a block; bounds activation memory
_BATCH_TOKENS = 2048


class _Captured(Exception):
    pass


class BlockInputs:
    """What each calibration batch feeds to the current decoder block: hidden states and the arguments that stay."""

    def __init__(self, hidden: list[torch.Tensor], kwargs: list[dict[str, Any]]) -> None:
        self.hidden = hidden
        self.kwargs = kwargs

    def run(self, block: nn.Module) -> Iterator[torch.Tensor]:
        """Outputs of ``block``, batch by batch."""
        for hidden, kwargs in zip(self.hidden, self.kwargs, strict=True):
            out = block(hidden, **kwargs)
            yield out[0] if isinstance(out, tuple) else out

    def advance(self, block: nn.Module, name: str) -> None:
        """Replace the inputs by the block's outputs, in place, so that only one set exists."""
        for i, out in enumerate(self.run(block)):
            if not torch.isfinite(out).all():
                raise QuantizationError(f"{name}: output holds NaN or Inf during calibration")
            self.hidden[i] = out


def capture_inputs(resolved: ResolvedModel, rows: list[torch.Tensor]) -> BlockInputs:
    """Run the model up to its first decoder block on all calibration rows."""
    first = resolved.layers[0].module
    hidden: list[torch.Tensor] = []
    kwargs: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append(args[0] if args else named["hidden_states"])
        kwargs.append({k: v for k, v in named.items() if k not in ("hidden_states", "past_key_values", "use_cache")})
        raise _Captured

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    per_batch = max(1, _BATCH_TOKENS // len(rows[0]))
    try:
        for start in range(0, len(rows), per_batch):
            try:
                resolved.model(input_ids=torch.stack(rows[start : start + per_batch]), use_cache=False)
            except _Captured:
                continue
    finally:
        handle.remove()
    return BlockInputs(hidden, kwargs)


@contextmanager
def stand_ins() -> Iterator[Callable[[nn.Module, str, nn.Module], None]]:
    """Gives a function that swaps a child module; every swap is undone on exit, whatever happens."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []

    def swap(parent: nn.Module, attr: str, module: nn.Module) -> None:
        swapped.append((parent, attr, getattr(parent, attr)))
        setattr(parent, attr, module)

    try:
        yield swap
    finally:
        for parent, attr, module in reversed(swapped):
            setattr(parent, attr, module)


class HessianSum:
    """Mean of x x^T over the inputs of one linear, float32."""

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, size)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(flat.T, flat)
        self.tokens += flat.shape[0]

    def mean(self) -> torch.Tensor:
        return self.total / max(self.tokens, 1)


def stage_hessian(block: nn.Module, inputs: BlockInputs, site: LinearSite) -> HessianSum:
    """Hessian of what reaches ``site`` when the calibration runs through its block (up to the site, no further)."""
    hessian = HessianSum(site.module.in_features)

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hessian.add(args[0])
        raise _Captured

    handle = getattr(site.parent, site.attr).register_forward_pre_hook(hook)
    try:
        for hidden, kwargs in zip(inputs.hidden, inputs.kwargs, strict=True):
            try:
                block(hidden, **kwargs)
            except _Captured:
                continue
    finally:
        handle.remove()
    if hessian.tokens == 0:
        raise QuantizationError(f"{site.name}: no calibration token reached this layer")
    return hessian


class RoutedTokens:
    """Inputs of a fused-experts module: hidden states and which experts they went to."""

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor] = []  # [T, H]
        self.index: list[torch.Tensor] = []  # [T, k]
        self.weights: list[torch.Tensor] = []  # [T, k]


def routed_tokens(block: nn.Module, inputs: BlockInputs, experts: nn.Module, name: str) -> RoutedTokens:
    """Run the calibration through a block and keep what reaches its experts."""
    seen = RoutedTokens()

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        tensors: list[torch.Tensor] = [*args, *list(named.values())[: 3 - len(args)]]
        hidden, index, weights = tensors
        seen.hidden.append(hidden.reshape(-1, hidden.shape[-1]))
        seen.index.append(index)
        seen.weights.append(weights.float())
        raise _Captured

    handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for hidden, kwargs in zip(inputs.hidden, inputs.kwargs, strict=True):
            try:
                block(hidden, **kwargs)
            except _Captured:
                continue
    finally:
        handle.remove()
    if not seen.hidden:
        raise QuantizationError(f"{name}: no calibration token reached the experts")
    return seen
