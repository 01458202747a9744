"""swap_flash_attention on a GPU, without one: our kernel by Triton's interpreter, and what would be chosen from."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llmopt.models import FAMILIES, resolve_model
from llmopt.ops import device
from llmopt.passes import SwapFlashAttention
from llmopt.passes.base import PassContext
from llmopt.passes.swap_flash_attention import candidates, forward
from llmopt.passes.swap_flash_attention.masks import Seen

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is not 1")

CUDA = torch.device("cuda")


@pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
def test_every_family_runs_on_our_kernel(family: str, tiny: Any, token_rows: Any) -> None:
    model = tiny(family, torch.float32)
    resolved, ids = resolve_model(model), token_rows(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        expected, tokens = model(ids, attention_mask=mask).logits, model.generate(ids, **options)
        ctx = PassContext(resolved, resolved.device, lambda event: None)
        with device.interpreting():
            patch = SwapFlashAttention(force="llmopt").apply(ctx).patch
            patch.enable()
            got = model(ids, attention_mask=mask).logits
            again = model.generate(ids, **options)
            patch.disable()
    # rows of padding see nothing, and are whatever an implementation makes of that
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(again, tokens)


def test_what_can_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "kernels_for", lambda kind: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    found = candidates.available(CUDA, torch.bfloat16)
    assert {name for name, reason in found.items() if not reason} == {"llmopt", "sdpa", "cudnn"}
    assert found["flash_attn"] == "the flash-attn package is not installed"
    assert "bfloat16" in candidates.available(CUDA, torch.float32)["cudnn"]
    assert not candidates.available(CUDA, torch.float32)["llmopt"]
    monkeypatch.setattr(candidates, "kernels_for", lambda kind: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    found = candidates.available(CUDA, torch.bfloat16)
    assert "8.0" in found["llmopt"]
    assert "cuDNN" in found["cudnn"]
    assert set(found) == set(forward.CANDIDATES)


def test_the_pass_applies_on_a_gpu_that_our_kernels_serve(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve_model(tiny("qwen3", torch.float32))
    monkeypatch.setattr(candidates, "kernels_for", lambda kind: True)
    assert SwapFlashAttention().check(PassContext(resolved, CUDA, lambda event: None)).applies
    monkeypatch.setattr(candidates, "kernels_for", lambda kind: False)
    verdict = SwapFlashAttention(force="llmopt").check(PassContext(resolved, CUDA, lambda event: None))
    assert not verdict.applies
    assert "8.0" in verdict.reason


@pytest.mark.parametrize("seen", [Seen(), Seen(window=3), Seen(torch.tensor([[False, True, True, True, True]]))])
def test_cudnn_first_computes_what_torch_does(seen: Seen, tiny: Any) -> None:
    module = resolve_model(tiny("qwen3")).layers[0].attention
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 32, generator=draw) for heads in (8, 2, 2))
    q = q[:, : 2 * module.num_key_value_groups]
    torch.testing.assert_close(
        forward.run_cudnn(module, q, k, v, seen, 0.2), forward.run_sdpa(module, q, k, v, seen, 0.2)
    )


def test_a_candidate_that_cannot_run_is_left_out_with_its_reason(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    model = tiny("qwen3")
    resolved = resolve_model(model)
    monkeypatch.setitem(forward.CANDIDATES, "sdpa", refuses)
    applied = SwapFlashAttention().apply(PassContext(resolved, resolved.device, lambda event: None))
    assert "no kernel image is available for execution on the device" in applied.coverage.skipped["sdpa"]
    assert set(applied.coverage.implementations.values()) == {"llmopt"}
    assert dataclasses.asdict(applied.coverage)["touched"] == len(resolved.layers)
