"""forward of a fused model: logits, caches, masks and hooks as the model as it was has them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from llmopt.models import FAMILIES
from llmopt.runtime.cache import CACHE, KVCache

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


@every_family
@torch.no_grad()
def test_a_cache_comes_back_and_goes_on(family: str, fused: Any, token_rows: Any) -> None:
    plain, model = fused(family)
    ids = token_rows(2, 20)
    expected = plain(ids).logits
    first = model(ids[:, :13], use_cache=True)
    assert isinstance(first.past_key_values, KVCache)
    second = model(ids[:, 13:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), expected)
    assert model(ids, use_cache=False).past_key_values is None


@every_family
@torch.no_grad()
def test_padding_on_the_left_and_on_the_right(family: str, fused: Any, token_rows: Any) -> None:
    plain, model = fused(family)
    ids = token_rows(3, 16)
    for columns in (slice(0, 5), slice(11, 16)):
        mask = torch.ones_like(ids)
        mask[1, columns] = 0
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        expected, got = (m(ids, attention_mask=mask, position_ids=position_ids).logits for m in (plain, model))
        close(got[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_a_cache_of_transformers_own_goes_through_the_models_own_layers(fused: Any, token_rows: Any) -> None:
    plain, model = fused("qwen3")
    ids = token_rows(1, 12)
    caches = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    expected, got = (m(ids, past_key_values=c).logits for m, c in zip((plain, model), caches, strict=True))
    close(got, expected)
    assert caches[1].get_seq_length() == 12
    fallbacks = model.model.forward._fallbacks
    assert list(fallbacks.values()) == [1]
    assert "DynamicCache" in next(iter(fallbacks))


@every_family
@torch.no_grad()
def test_our_cache_serves_the_models_own_layers_too(family: str, fused: Any, token_rows: Any) -> None:
    plain, model = fused(family)
    ids = token_rows(2, 14)
    expected = plain(ids, output_hidden_states=True)
    first = model(ids[:, :9], use_cache=True)
    second = model(ids[:, 9:], past_key_values=first.past_key_values, output_hidden_states=True)
    close(second.logits, expected.logits[:, 9:])
    close(second.hidden_states[1], expected.hidden_states[1][:, 9:])
    third = model(ids[:, :3], past_key_values=second.past_key_values)
    close(third.logits, plain(torch.cat([ids, ids[:, :3]], 1)).logits[:, 14:])


@torch.no_grad()
def test_embeddings_instead_of_ids(fused: Any, token_rows: Any) -> None:
    plain, model = fused("ernie4_5")
    ids = token_rows(2, 9)
    close(model(inputs_embeds=plain.get_input_embeddings()(ids)).logits, plain(ids).logits)


@torch.no_grad()
def test_hooks_on_layers_see_and_change_what_passes(fused: Any, token_rows: Any) -> None:
    plain, model = fused("qwen3")
    ids = token_rows(2, 9)
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "fused": []}
    for name, each in (("plain", plain), ("fused", model)):
        for layer in each.model.layers:
            layer.register_forward_hook(
                lambda m, a, out, name=name: seen[name].append(out[0] if isinstance(out, tuple) else out)
            )
        each.model.layers[0].register_forward_hook(
            lambda m, a, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2
        )
    close(model(ids).logits, plain(ids).logits)
    for a, b in zip(seen["fused"], seen["plain"], strict=True):
        close(a, b)


def test_gradients_go_through_the_models_own_layers(fused: Any, token_rows: Any) -> None:
    plain, model = fused("qwen3")
    ids = token_rows(1, 9)
    embeds = plain.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert float(embeds.grad.abs().sum()) > 0


@torch.no_grad()
def test_logits_are_float32_and_only_those_asked_for(fused: Any, token_rows: Any) -> None:
    _, model = fused("qwen3", torch.bfloat16)
    out = model(token_rows(2, 9), logits_to_keep=1)
    assert out.logits.shape[:2] == (2, 1)
    assert out.logits.dtype == torch.float32


@every_family
def test_the_cache_goes_by_the_name_that_transformers_has_for_it(family: str, fused: Any, token_rows: Any) -> None:
    plain, model = fused(family)
    assert CACHE in inspect.signature(plain.model.forward).parameters
    assert CACHE in model(token_rows(1, 5), use_cache=True)
    # the stack's own name, before 5.24 and since
    ids = token_rows(1, 9)
    whole = model.model(ids).last_hidden_state[:, 5:]
    for name in ("past_key_values", "cache"):
        first = model.model(ids[:, :5], use_cache=True)
        second = model.model(ids[:, 5:], **{name: first[CACHE]})
        torch.testing.assert_close(second.last_hidden_state, whole, rtol=1e-4, atol=1e-4)
