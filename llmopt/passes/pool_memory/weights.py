"""Weights that lie apart, moved into one block in the order of execution."""

from __future__ import annotations

import torch
from torch import nn

from llmopt.arena import ALIGNMENT, SMALL_BYTES, huge_block
from llmopt.passes.base import Swap
from llmopt.runtime.pools import pool_of_its_own


def planned(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to move: all, in the order of execution, or none where there is little to gain.

    Packed weights are buffers, and lie in a block already (:mod:`llmopt.arena`).
    """
    found = list(model.parameters())
    return found if sum(p.nbytes for p in found) >= SMALL_BYTES else []


def moved(parameters: list[nn.Parameter], device: torch.device, model: nn.Module) -> list[Swap]:
    """Swaps that put copies in one block in their place; tied weights stay tied."""
    if not parameters:
        return []
    sizes = [-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters]
    block = _block(sum(sizes), device)
    copies: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for parameter, place in zip(parameters, block.split(sizes), strict=True):
            copy = place[: parameter.nbytes].view(parameter.dtype).view(parameter.shape).copy_(parameter)
            copies[id(parameter)] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
    return [
        Swap(module, name, copies[id(parameter)])
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in copies
    ]


def _block(size: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return huge_block(size)
    with pool_of_its_own(device):
        return torch.empty(size, dtype=torch.uint8, device=device)
