"""A fused model of any family, and the same model before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native


@pytest.fixture
def fused(tiny: Any) -> Callable[..., tuple[Any, Any]]:
    """``fused(family, dtype)``: ``(plain, fused)``, two models with the same weights."""
    if not native.available():
        pytest.skip("no compiled kernels")

    def make(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        plain, model = tiny(family, dtype), tiny(family, dtype)
        llmopt.optimize(model, passes=["fuse_kernels"], measure=False, calibration=torch.arange(64).view(2, 32))
        return plain, model

    return make
