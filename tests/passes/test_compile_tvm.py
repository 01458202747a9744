"""compile_tvm: the compiled step beside the model without it, on every family, quantized or not, fused or not."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native
from llmopt.errors import PassError
from llmopt.measure.memory import rss_bytes
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes import CompileTvm, FuseKernels
from llmopt.passes.base import PassContext
from llmopt.runtime.generate import engine_of
from llmopt.runtime.step import DecodeStep

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
TOKENS = 64


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def pair(tiny: Any, rows: Any, family: str, *, int4: bool, fused: bool) -> tuple[Any, Any]:
    """The same model twice: without the pass and with it."""
    before = (["quantize_gptq"] if int4 else []) + (["fuse_kernels"] if fused else [])
    made = []
    for passes in (before, [*before, "compile_tvm"]):
        model = tiny(family)
        if passes:
            llmopt.optimize(model, passes=passes, calibration=rows(4, 48), measure=False)
        made.append(model)
    return made[0], made[1]


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("int4", [False, True], ids=["fp32", "int4"])
@every_family
def test_logits_and_greedy_tokens_are_those_of_the_model_without_it(
    family: str, int4: bool, fused: bool, tiny: Any, token_rows: Any
) -> None:
    plain, compiled = pair(tiny, token_rows, family, int4=int4, fused=fused)
    ids = token_rows(1, 20, seed=3)
    want, got = decoded(plain, ids), decoded(compiled, ids)
    assert torch.equal(want.sequences, got.sequences)
    expected, found = torch.stack(want.logits).float(), torch.stack(got.logits).float()
    # int8 activations round differently where the numbers before them differ in the last bit
    torch.testing.assert_close(found, expected, rtol=0, atol=(5e-2 if int4 else 1e-4) * float(expected.abs().max()))
    kernels = report_of(compiled)["kernels"]
    assert bool(kernels) != (fused and "latent" not in str(kernels)) or family.startswith("deepseek")


def report_of(model: Any) -> dict[str, Any]:
    (row,) = [row for row in llmopt.report(model).passes if row.name == "compile_tvm"]
    details: dict[str, Any] = row.details
    return details
