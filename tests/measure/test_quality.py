"""Quality against the baseline: figures checked by hand on logits we choose, and on real tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from llmopt.measure import quality
from llmopt.models import family_for, resolve_model
from llmopt.models.shapes import build
from llmopt.passes import QuantizeGptq
from llmopt.passes.base import Patch, Swap


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama")


def patched(model: Any, layer: int, after: Any) -> Patch:
    module = model.model.layers[layer]
    forward = module.forward

    def wrapped(*args: Any, **named: Any) -> Any:
        out = forward(*args, **named)
        return (after(out[0]), *out[1:]) if isinstance(out, tuple) else after(out)

    patch = Patch([Swap(module, "forward", wrapped)])
    patch.enable()
    return patch


def test_a_model_against_itself_is_perfect(model: Any, token_rows: Any) -> None:
    resolved, ids = resolve_model(model), token_rows(5, 40)
    reference = quality.reference(resolved, ids)
    found = quality.compare(resolved, reference)
    assert (found.mean_kl, found.max_kl, found.max_abs_logit_diff) == (0, 0, 0)
    assert found.top1_agreement == 1
    assert found.perplexity_ratio == 1
    assert found.tokens == 200
    assert found.first_divergent_layer is None
    assert found.non_finite == []
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert float(reference.nll) == pytest.approx(float(loss), rel=1e-4)


def test_figures_are_those_of_the_definitions(model: Any, token_rows: Any) -> None:
    resolved, ids = resolve_model(model), token_rows(3, 30)
    reference = quality.reference(resolved, ids)
    with torch.no_grad():
        base = model(input_ids=ids).logits.double().log_softmax(-1)
        patched(model, 1, lambda out: out + 0.2 * out.roll(1, -1))
        now = model(input_ids=ids).logits.double().log_softmax(-1)
    found = quality.compare(resolved, reference)
    kl = (base.exp() * (base - now)).sum(-1)
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.max_kl == pytest.approx(float(kl.max()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((base.argmax(-1) == now.argmax(-1)).double().mean()))
    assert 0 < found.top1_agreement < 1
    assert found.max_abs_logit_diff == pytest.approx(float((base - now).abs().max()), rel=1e-3)

    def perplexity(log_probs: torch.Tensor) -> float:
        return math.exp(-float(log_probs[:, :-1].gather(-1, ids[:, 1:, None]).mean()))

    assert found.perplexity == pytest.approx(perplexity(now), rel=1e-3)
    assert found.perplexity_ratio == pytest.approx(perplexity(now) / perplexity(base), rel=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layer_that_differs_is_named(layer: int, model: Any, token_rows: Any) -> None:
    resolved = resolve_model(model)
    reference = quality.reference(resolved, token_rows(3, 30))
    patched(model, layer, lambda out: out * 1.001)
    assert quality.compare(resolved, reference).first_divergent_layer == f"model.layers.{layer}"


def test_rounding_of_the_dtype_is_no_difference(tiny: Any, token_rows: Any) -> None:
    for dtype, seen in ((torch.float32, True), (torch.bfloat16, False)):
        model = tiny("llama", dtype)
        resolved = resolve_model(model)
        reference = quality.reference(resolved, token_rows(3, 30))
        patched(model, 0, lambda out: out * 1.001)
        assert (quality.compare(resolved, reference).first_divergent_layer == "model.layers.0") == seen


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["f32_first", "bf16_first"])
def test_of_two_dtypes_the_coarser_one_counts(base: torch.dtype, tiny: Any, token_rows: Any) -> None:
    other = torch.bfloat16 if base == torch.float32 else torch.float32
    reference = quality.reference(resolve_model(tiny("llama", base)), token_rows(3, 30))
    model = tiny("llama", other)
    found = quality.compare(resolve_model(model), reference)
    assert found.mean_kl > 0
    assert found.first_divergent_layer is None
    patched(model, 1, lambda out: out * 1.2)
    assert quality.compare(resolve_model(model), reference).first_divergent_layer == "model.layers.1"


def resized(**changes: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", **{**family_for("llama").tiny_config, **changes})
    return build(config, dtype=torch.float32)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"hidden_size": 64}], ids=["deeper", "flat", "thin"]
)
def test_models_of_other_sizes_are_compared_on_logits_alone(
    changes: dict[str, Any], model: Any, token_rows: Any
) -> None:
    other, ids = resized(**changes), token_rows(3, 30)
    found = quality.compare(resolve_model(other), quality.reference(resolve_model(model), ids))
    with torch.no_grad():
        base, now = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, other))
    assert found.mean_kl == pytest.approx(float((base.exp() * (base - now)).sum(-1).mean()), rel=1e-3)
    assert found.first_divergent_layer is None
    assert found.non_finite == []
    patched(other, 0, lambda out: out * torch.nan)
    found = quality.compare(resolve_model(other), quality.reference(resolve_model(model), ids))
    assert found.non_finite[0] == "model.layers.0"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("at", [(0, 3), (2, 20)], ids=["first_row", "last_row"])
def test_nan_and_inf_never_look_like_a_good_result(
    bad: float, at: tuple[int, int], model: Any, token_rows: Any
) -> None:
    resolved = resolve_model(model)
    reference = quality.reference(resolved, token_rows(3, 30))

    def spoil(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        if out.shape[0] > at[0]:
            out[(*at, 0)] = bad
        return out

    patched(model, 1, spoil)
    found = quality.compare(resolved, reference)
    for figure in (found.mean_kl, found.max_kl, found.max_abs_logit_diff, found.perplexity, found.perplexity_ratio):
        assert not math.isfinite(figure)
    assert math.isnan(found.mean_kl)
    assert math.isnan(found.max_kl)
    assert math.isnan(found.max_abs_logit_diff)
    if at[0] == 0:
        assert found.non_finite == ["model.layers.1"]
        assert found.first_divergent_layer == "model.layers.1"


def test_logits_that_overflow_give_an_infinite_perplexity_not_an_error(model: Any, token_rows: Any) -> None:
    resolved = resolve_model(model)
    reference = quality.reference(resolved, token_rows(3, 30))
    patched(model, 1, lambda out: torch.nn.functional.one_hot(torch.zeros(out.shape[:2]).long(), 128).float() * 1e4)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = quality.compare(resolved, reference)
    assert found.perplexity == math.inf
    assert found.perplexity_ratio == math.inf


def test_hooks_of_the_comparison_are_taken_off(model: Any, token_rows: Any) -> None:
    resolved = resolve_model(model)
    reference = quality.reference(resolved, token_rows(3, 30))
    quality.compare(resolved, reference)

    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cannot")

    patched(model, 1, fail)
    with pytest.raises(RuntimeError, match="cannot"):
        quality.compare(resolved, reference)
    with pytest.raises(RuntimeError, match="cannot"):
        quality._layer_outputs(resolved, reference.ids)
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_batches_do_not_change_the_figures(model: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, ids = resolve_model(model), token_rows(7, 30)
    found = []
    for tokens in (30, 64, 100_000):
        monkeypatch.setattr(quality, "_BATCH_TOKENS", tokens)
        reference = quality.reference(resolved, ids)
        patch = patched(model, 0, lambda out: out + 0.2 * out.roll(1, -1))
        found.append(quality.compare(resolved, reference))
        patch.disable()
    for other in found[1:]:
        assert other.mean_kl == pytest.approx(found[0].mean_kl, rel=1e-4)
        assert other.perplexity == pytest.approx(found[0].perplexity, rel=1e-4)
        assert other.top1_agreement == found[0].top1_agreement


@pytest.mark.parametrize(("vocab", "shape"), [(512, (20, 100)), (151936, (5, 100)), (10**8, (1, 64)), (10**6, (1, 83))])
def test_rows_fit_the_memory_set_aside_for_logits(vocab: int, shape: tuple[int, int]) -> None:
    rows = [torch.arange(100) for _ in range(20)]
    chosen = quality.choose_rows(rows, vocab)
    assert tuple(chosen.shape) == shape
    assert torch.equal(chosen[0], torch.arange(shape[1]))


def test_a_better_quantization_has_the_better_figures(tiny: Any, token_rows: Any) -> None:
    from llmopt.passes.base import PassContext

    model = tiny("qwen3")
    resolved = resolve_model(model)
    reference = quality.reference(resolved, token_rows(4, 50, seed=1))
    context = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(8, 64)))
    kls = []
    for options in ({"group_size": 32, "sym": False}, {"group_size": -1, "head_bits": 4}):
        applied = QuantizeGptq(**options).apply(context)
        applied.patch.enable()
        kls.append(quality.compare(resolved, reference))
        applied.patch.disable()
    assert 0 < kls[0].mean_kl < kls[1].mean_kl
    assert kls[0].top1_agreement > kls[1].top1_agreement


def test_the_head_may_be_quantized_too(tiny: Any, token_rows: Any) -> None:
    model = tiny("qwen3")
    resolved = resolve_model(model)
    reference = quality.reference(resolved, token_rows(2, 30))
    assert isinstance(resolved.head.module, nn.Linear)
    patch = Patch([Swap(model, "lm_head", nn.Linear(128, 512, bias=False))])
    patch.enable()
    found = quality.compare(resolved, reference)
    # all layers agree, the logits do not
    assert found.first_divergent_layer is None
    assert found.mean_kl > 0.01
