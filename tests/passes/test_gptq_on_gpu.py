"""quantize_gptq on a GPU, without one: the solver by Triton's interpreter, and where its tensors are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from placed import Unplaced

from llmopt.models import resolve_model
from llmopt.ops import device
from llmopt.ops.gptq_round import reference
from llmopt.passes import QuantizeGptq
from llmopt.passes.base import PassContext
from llmopt.passes.quantize_gptq import rounding, solver
from llmopt.passes.quantize_gptq.rounding import Grid
from llmopt.passes.quantize_gptq.solver import solve

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is not 1")


@pytest.mark.parametrize(("symmetric", "group_size"), [(True, 32), (False, 32), (True, -1)])
def test_the_solver_finds_as_good_codes_as_on_the_cpu(symmetric: bool, group_size: int) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 24, 80, generator=draw)
    x = torch.randn(2, 400, 80, generator=draw)
    hessian, drift = x.transpose(1, 2) @ x / 400, torch.randn(2, 80, 80, generator=draw) * 1e-3
    options: Any = {"grid": Grid(4, symmetric), "group_size": group_size, "damp": 0.01, "name": "w"}
    expected = solve(weight, hessian, drift, **options)
    with device.interpreting():
        got = solve(weight, hessian, drift, **options)
    # one weight on the edge between two codes moves what follows it in its row
    assert (got.q == expected.q).float().mean() > 0.97
    torch.testing.assert_close(got.loss, expected.loss, rtol=0.01, atol=0)


@pytest.mark.parametrize("options", [{}, {"sym": False, "group_size": -1}, {"head_bits": 4, "group_size": 32}], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "ernie4_5_moe", "deepseek_v2"])
def test_every_tensor_is_made_where_the_model_is(
    family: str, options: dict[str, Any], tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((solver, "search_scales"), (solver, "round_span"), (rounding, "search_scales")):
        monkeypatch.setattr(module, name, getattr(reference, name))
    resolved = resolve_model(tiny(family, torch.float32))
    ctx = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(2, 32)))
    with Unplaced() as mode:
        QuantizeGptq(min_expert_tokens=4, **options).apply(ctx)
    assert mode.found == []
