"""W_UK and W_UV are made once for a weight, and again when the weight is another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.models import resolve_model
from llmopt.runtime.engine import Engine

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


def test_halves_outlive_an_engine_but_not_a_change_of_the_weight(tiny: Any) -> None:
    model = tiny("deepseek_v2")

    def halves() -> tuple[torch.Tensor, torch.Tensor]:
        block: Any = Engine(resolve_model(model)).layers[0][0]
        found: tuple[torch.Tensor, torch.Tensor] = block.halves()
        return found

    first = halves()
    assert all(a is b for a, b in zip(first, halves(), strict=True))
    weight = model.model.layers[0].self_attn.kv_b_proj.weight
    for change in (lambda: weight.detach().mul_(2), lambda: weight.data.mul_(0.5)):
        before = halves()
        change()
        assert not torch.equal(halves()[0], before[0])
    torch.testing.assert_close(halves()[0], first[0])
