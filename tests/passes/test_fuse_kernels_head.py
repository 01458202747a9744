"""fuse_kernels' screened head: who gets one, its trial, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmopt
from llmopt import native
from llmopt.checkpoint import recorded_passes
from llmopt.errors import InputError
from llmopt.measure import traffic
from llmopt.models import resolve_model
from llmopt.passes import FuseKernels, QuantizeGptq
from llmopt.passes.base import PassContext
from llmopt.passes.quantize_gptq import calibrate
from llmopt.runtime import screen
from llmopt.runtime.engine import Engine

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def context(model: Any, rows: list[torch.Tensor]) -> PassContext:
    return PassContext(resolve_model(model), torch.device("cpu"), lambda event: None, calibration=rows)


@pytest.fixture
def quantized(tiny: Any, token_rows: Any) -> PassContext:
    ctx = context(tiny("qwen3"), list(token_rows(2, 24)))
    QuantizeGptq(group_size=64).apply(ctx).patch.enable()
    return ctx


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2"])
def test_decoding_reads_the_weights_that_are_there(tiny: Any, token_rows: Any, family: str) -> None:
    """Other patches come and go under this one; a recorded step must not outlive the weights it reads."""
    model, prompt = tiny(family), token_rows(1, 12)
    ctx = context(model, list(token_rows(2, 24)))
    quantize = QuantizeGptq(group_size=64).apply(ctx).patch
    quantize.enable()
    fuse = FuseKernels().apply(ctx).patch
    fuse.enable()

    def tokens() -> list[int]:
        found: list[int] = model.generate(prompt, max_new_tokens=24, do_sample=False)[0].tolist()
        return found

    packed = tokens()  # its cache and step are kept for the next call
    fuse.disable(), quantize.disable()
    fuse.enable()
    plain = tokens()
    fuse.disable()
    assert plain != packed
    assert plain == tokens()


def test_a_head_without_8_bits_cannot_be_screened(tiny: Any, token_rows: Any) -> None:
    ctx = context(tiny("qwen3"), list(token_rows(2, 24)))
    assert FuseKernels().check(ctx).applies
    verdict = FuseKernels(screened_head=True).check(ctx)
    assert not verdict.applies
    assert verdict.reason == "screened_head: a screen needs 8 bits, the head has 32"
    assert FuseKernels().apply(ctx).coverage.implementations["head"] == "all rows"


def test_a_small_head_is_screened_only_for_who_asks(quantized: PassContext) -> None:
    for wanted, expected in ((None, "all rows"), (False, "all rows"), (True, "greedy: all rows in 4 bits")):
        applied = FuseKernels(screened_head=wanted).apply(quantized)
        assert applied.coverage.implementations["head"].startswith(expected)
        assert ("screened_head" in applied.details) == bool(wanted)


def test_a_large_head_is_screened_after_a_trial(quantized: PassContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_LEAST_BYTES", 1)
    monkeypatch.setattr("llmopt.passes.fuse_kernels._MOST_SCORED", 1.0)  # a head of a few tiles
    applied = FuseKernels().apply(quantized)
    assert applied.coverage.implementations["head"].startswith("greedy")
    trial = applied.details["screened_head"]
    assert trial["positions"] == 24
    assert trial["share"] == 1.0
    assert 0 < trial["rows_scored"] <= 1
    monkeypatch.setattr(screen, "agreement", lambda *given: screen.Agreement(1000, 0.998, 0.01))
    assert "left out" in FuseKernels().apply(quantized).coverage.implementations["head"]
    monkeypatch.setattr(screen, "agreement", lambda *given: screen.Agreement(1000, 1.0, 0.5))
    monkeypatch.setattr("llmopt.passes.fuse_kernels._MOST_SCORED", 0.1)
    assert "left out" in FuseKernels().apply(quantized).coverage.implementations["head"]


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_what_a_trial_decided_is_not_tried_again_on_load(
    tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch, share: float, tmp_path: Path
) -> None:
    monkeypatch.setattr(screen, "_LEAST_BYTES", 1)
    tried = []
    monkeypatch.setattr(screen, "agreement", lambda *given: tried.append(1) or screen.Agreement(1000, share, 0.01))
    passes = [QuantizeGptq(group_size=64), FuseKernels()]
    model = llmopt.optimize(tiny("qwen3"), passes, calibration=list(token_rows(2, 24)), measure=False)
    saved = llmopt.save(model, tmp_path / "model")
    assert recorded_passes(saved)["fuse_kernels"]["screened_head"] is (share == 1.0)
    assert tried == [1]
    loaded = llmopt.load(saved)
    assert tried == [1]
    ids = torch.arange(8)[None]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_half_of_the_head_is_counted_while_it_is_screened(quantized: PassContext) -> None:
    resolved = quantized.resolved
    before = traffic.weight_bytes_per_token(resolved)
    read = []
    for wanted in (False, True):
        patch = FuseKernels(screened_head=wanted).apply(quantized).patch
        patch.enable()
        read.append(traffic.weight_bytes_per_token(resolved))
        patch.disable()
    head = Engine(resolved).head
    assert read[0] == before == traffic.weight_bytes_per_token(resolved)
    assert before - read[1] == screen.bytes_spared(head) == head.rows * head.cols // 2


@pytest.mark.parametrize("wrong", [1.5, "yes"])
def test_a_wrong_option_names_itself(wrong: Any) -> None:
    with pytest.raises(InputError, match="screened_head: expected None, True or False"):
        FuseKernels(screened_head=wrong)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-ernie4_5_moe", "tiny-deepseek_v3"])
def test_held_out_text_gets_the_tokens_of_the_8_bit_head(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.bfloat16, local_files_only=True).eval()
    ctx = context(model, calibrate.rows(None, model, num_rows=4, row_tokens=128))
    QuantizeGptq(group_size=64).apply(ctx).patch.enable()
    text = (ASSETS / "heldout.txt").read_text(encoding="utf-8")
    engine = Engine(ctx.resolved)
    rows = calibrate.rows(text, model, num_rows=6, row_tokens=256)
    found = [screen.agreement(engine, row) for row in rows]
    assert sum(a.positions for a in found) == 1536
    assert all(a.share == 1.0 for a in found)
    assert max(a.rows_scored for a in found) < 0.5
