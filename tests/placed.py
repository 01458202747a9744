"""Tensors that are made without saying on which device: on a GPU they would lie on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MAKERS = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor, torch.eye, torch.rand, torch.randn,
    torch.randint, torch.linspace,
}  # fmt: skip


class Unplaced(TorchFunctionMode):
    """Calls that make a tensor without saying on which device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None:
            self.found.append(f"{func.__name__}{args}")
        return func(*args, **kwargs)
