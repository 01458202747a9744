"""Prompt lookup: the tokens, scores and bits of plain decoding, in fewer steps."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

import llmopt
from llmopt.errors import InputError
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes import FuseKernels, QuantizeGptq
from llmopt.runtime import generate as loop
from llmopt.runtime import lookup
from llmopt.runtime.engine import Engine
from llmopt.runtime.lookup import STEP_TOKENS, Gain, NgramIndex
from llmopt.runtime.step import DecodeStep

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was guessed is verified, however it is measured."""
    widest = lambda self, ngram, most: max((m for m in STEP_TOKENS if m <= most + 1), default=1) - 1  # noqa: E731
    monkeypatch.setattr(Gain, "worth", widest)


@pytest.fixture
def repeating() -> torch.Tensor:
    """A prompt that says everything three times."""
    return torch.arange(5, 19).repeat(3)[None]


def counts_of(model: Any) -> dict[str, int]:
    found: dict[str, int] = llmopt.report(model).passes[0].details["prompt_lookup"]
    return found


# ---- n-grams


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_the_longest_ngram_and_its_last_place_are_found(longest: int) -> None:
    draw = random.Random(longest)
    tokens = [draw.randrange(4) for _ in range(80)]
    index = NgramIndex(tokens[:20], longest)
    for end in range(20, 80):
        found, following = index.following(6)
        sizes = [n for n in range(1, longest + 1) for i in range(n, end) if tokens[i - n : i] == tokens[end - n : end]]
        assert found == max(sizes, default=0)
        place = max(i for i in range(found, end) if tokens[i - found : i] == tokens[end - found : end])
        assert following[: end - place] == tokens[place:end][:6]
        index.append(tokens[end])


def test_what_reaches_the_end_goes_on_with_itself() -> None:
    assert NgramIndex([9, 1, 2, 3, 1, 2, 3], 3).following(7) == (3, [1, 2, 3, 1, 2, 3, 1])
    assert NgramIndex([4, 4], 3).following(3) == (1, [4, 4, 4])


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3]])
def test_nothing_follows_what_was_not_there(tokens: list[int]) -> None:
    assert NgramIndex(tokens, 3).following(4) == (0, [])


# ---- is it worth it


def measured(slope: float, right: float) -> Gain:
    """A gain that has seen steps of 1 and 4 tokens of such cost, and such a share of right guesses."""
    gain = Gain(3)
    for i in range(400):
        gain.took(1, 1.0)
        gain.took(4, 1.0 + 3 * slope)
        gain.guessed(2, (i % 20) < 20 * right)
    gain.took(1, 1.0)
    return gain


def test_right_guesses_are_worth_a_wide_step_and_wrong_ones_none() -> None:
    assert measured(0.1, 1.0).worth(2, 15) == 15
    assert measured(0.1, 0.0).worth(2, 15) == 0
    assert measured(1.1, 1.0).worth(2, 15) == 0, "tokens that cost a step each gain nothing"
    assert 0 < measured(0.15, 0.5).worth(2, 15) < 8
    assert measured(0.1, 1.0).worth(2, 4) == 3, "the widest step that four guesses fill"
    assert measured(0.1, 1.0).worth(2, 0) == 0


def test_lengths_are_judged_each_for_itself() -> None:
    gain = measured(0.1, 1.0)
    for _ in range(50):
        gain.guessed(1, False)
    assert gain.worth(1, 15) == 0
    assert gain.worth(2, 15) == 15


def test_wrong_guesses_end_it_and_right_ones_bring_it_back() -> None:
    gain = Gain(3)
    assert gain.worth(2, 7) == 0, "the time of a plain step is not known yet"
    gain.took(1, 1.0)
    assert gain.worth(2, 7) > 0
    gain.guessed(2, False)
    gain.guessed(2, False)
    assert gain.worth(2, 7) == 0
    for _ in range(10):
        gain.guessed(2, True)
    assert gain.worth(2, 7) > 0


def test_a_step_that_was_interrupted_does_not_end_it() -> None:
    gain = measured(0.1, 0.9)
    gain.took(8, 100.0)
    assert gain.worth(2, 7) > 0
    gain = measured(0.1, 0.0)
    gain.took(1, 100.0)
    assert gain.worth(2, 7) == 0


def test_a_plain_step_is_run_now_and_then() -> None:
    gain = measured(0.1, 1.0)
    for _ in range(40):
        gain.took(8, 1.7)
    assert gain.worth(2, 7) == 0
    gain.took(1, 1.0)
    assert gain.worth(2, 7) > 0


# ---- one step of several tokens


def bits(engine: Engine, prompt: torch.Tensor, tokens: list[int], size: int, padding: int) -> torch.Tensor:
    """Logits behind each of the tokens, decoded ``size`` at a time after a prompt."""
    cache = engine.new_cache(1, 400)
    cache.start.fill_(padding)
    cache.length = padding
    step, wide = DecodeStep(engine, cache), DecodeStep(engine, cache, size)
    for token in prompt.tolist():
        step.start(cache.length - cache.start)
        step.ids[0] = token
        step.run()
        cache.length += 1
    found = []
    for at in range(0, len(tokens), size):
        wide.ids.copy_(torch.tensor(tokens[at : at + size][::-1]))
        wide.start(cache.length - cache.start)
        wide.run()
        cache.length += size
        found.append(wide.logits.flip(0).clone())
        assert torch.equal(wide.ids, wide.logits.argmax(-1))
    return torch.cat(found)


@every_family
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tokens_decoded_together_have_the_bits_of_tokens_decoded_alone(
    family: str, dtype: torch.dtype, tiny: Any, isa: str
) -> None:
    engine = Engine(resolve_model(tiny(family, dtype)))
    prompt, tokens = torch.arange(1, 40), [int(x) for x in torch.arange(240).mul(37) % 500]
    expected = bits(engine, prompt, tokens, 1, padding=3)
    # the keys of 280 tokens are split where there are more than 256
    for size in (2, 3, 8, 16):
        assert torch.equal(bits(engine, prompt, tokens, size, padding=3), expected)


@every_family
@torch.no_grad()
def test_of_packed_weights_too(family: str, tiny: Any, isa: str) -> None:
    model = tiny(family)
    calibration = torch.arange(256).view(4, 64)
    llmopt.optimize(model, passes=[QuantizeGptq(group_size=32)], measure=False, calibration=calibration)
    engine = Engine(resolve_model(model))
    prompt, tokens = torch.arange(1, 40), [int(x) for x in torch.arange(48).mul(37) % 500]
    expected = bits(engine, prompt, tokens, 1, padding=0)
    for size in (2, 4, 6, 8, 12, 16):
        assert torch.equal(bits(engine, prompt, tokens, size, padding=0), expected)


# ---- generate


@every_family
def test_greedy_tokens_are_those_of_plain_decoding(
    family: str, fused: Any, repeating: torch.Tensor, eager: None
) -> None:
    plain, model = fused(family)
    expected = plain.generate(repeating, **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(repeating, prompt_lookup_num_tokens=5, **GREEDY), expected)
    counts = counts_of(model)
    assert 0 < counts["steps"] < 2 * 39
    assert counts["right"] == 2 * 39 - counts["steps"]
    assert counts["guesses"] >= counts["right"] > 0


def test_of_int4_weights_the_logits_are_those_of_plain_decoding(
    trained: Any, repeating: torch.Tensor, eager: None
) -> None:
    model = trained("qwen3")
    llmopt.optimize(model, passes=["quantize_gptq", "fuse_kernels"], measure=False)
    asked = {**GREEDY, "max_new_tokens": 120, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(repeating, **asked)
    got = model.generate(repeating, prompt_lookup_num_tokens=15, **asked)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    assert len(got.logits) == 120
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert llmopt.report(model).passes[1].details["prompt_lookup"]["right"] > 0


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.3}, {"top_k": 3}, {"repetition_penalty": 1.2}, {"min_new_tokens": 20, "do_sample": False}],
    ids=lambda o: ",".join(o) or "plain",
)
def test_sampled_tokens_agree_under_one_seed(
    options: dict[str, Any], fused: Any, repeating: torch.Tensor, eager: None
) -> None:
    _, model = fused("qwen3")
    found = []
    for lookup_tokens in (None, 7):
        torch.manual_seed(3)
        asked = {**GREEDY, "max_new_tokens": 150, "do_sample": True, **options}
        found.append(model.generate(repeating, prompt_lookup_num_tokens=lookup_tokens, **asked))
    assert torch.equal(*found)
    assert counts_of(model)["guesses"] > 0


@pytest.mark.parametrize("new", [1, 2, 3, 4, 9])
def test_it_stops_where_plain_decoding_stops(new: int, fused: Any, repeating: torch.Tensor, eager: None) -> None:
    plain, model = fused("qwen3")
    asked = {**GREEDY, "max_new_tokens": new}
    got = model.generate(repeating, prompt_lookup_num_tokens=15, **asked)
    assert torch.equal(got, plain.generate(repeating, **asked))
    asked = {**GREEDY, "eos_token_id": int(got[0, -1])}
    expected = plain.generate(repeating, **asked)
    assert torch.equal(model.generate(repeating, prompt_lookup_num_tokens=15, **asked), expected)


def test_a_padded_sequence(fused: Any, repeating: torch.Tensor, eager: None) -> None:
    plain, model = fused("deepseek_v3")
    mask = torch.ones_like(repeating)
    mask[:, :9] = 0
    expected, got = (
        m.generate(repeating, attention_mask=mask, **o, **GREEDY)
        for m, o in ((plain, {}), (model, {"prompt_lookup_num_tokens": 6}))
    )
    assert torch.equal(got, expected)
    assert counts_of(model)["guesses"] > 0


def test_a_cache_that_grows_and_a_conversation(
    fused: Any, repeating: torch.Tensor, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = fused("qwen3")
    take = loop.Generation._take_cache
    monkeypatch.setattr(loop.Generation, "_take_cache", lambda self, n, capacity: take(self, n, 4))
    found = []
    for each, asked in ((plain, GREEDY), (model, {**GREEDY, "prompt_lookup_num_tokens": 7})):
        first = each.generate(repeating, return_dict_in_generate=True, **asked)
        longer = torch.cat([first.sequences, repeating[:, :5]], -1)
        found.append(each.generate(longer, past_key_values=first.past_key_values, **asked))
    assert torch.equal(*found)


def test_the_option_of_the_pass_and_batches(tiny: Any, repeating: torch.Tensor, eager: None) -> None:
    plain, model = tiny("qwen3"), tiny("qwen3")
    rows = torch.arange(64).view(2, 32)
    llmopt.optimize(model, passes=[FuseKernels(prompt_lookup=7)], measure=False, calibration=rows)
    batch = repeating.repeat(3, 1)
    assert torch.equal(model.generate(batch, **GREEDY), plain.generate(batch, **GREEDY))
    assert counts_of(model) == {"steps": 0, "guesses": 0, "right": 0}, "a batch decodes plainly"
    assert torch.equal(model.generate(repeating, **GREEDY), plain.generate(repeating, **GREEDY))
    assert counts_of(model)["right"] > 0
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(batch, prompt_lookup_num_tokens=3, **GREEDY)
    other = copy.deepcopy(model)
    before = dict(counts_of(model))
    assert torch.equal(other.generate(repeating, **GREEDY), plain.generate(repeating, **GREEDY))
    assert counts_of(model) == before, "a copy counts for itself"


@pytest.mark.parametrize("wrong", [-1, 16, 2.0, True, None], ids=str)
def test_a_wrong_option_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="prompt_lookup: expected 0 to 15"):
        FuseKernels(prompt_lookup=wrong)


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 0}, {"max_matching_ngram_size": -1}], ids=str)
def test_wrong_arguments_of_generate_are_refused_as_by_transformers(
    asked: dict[str, Any], fused: Any, repeating: torch.Tensor
) -> None:
    for each in fused("qwen3"):
        with pytest.raises(ValueError, match="max_matching_ngram_size or num_output_tokens"):
            each.generate(repeating, **{"prompt_lookup_num_tokens": 3, **asked}, **GREEDY)


def test_what_is_not_covered_goes_transformers_way(fused: Any, repeating: torch.Tensor) -> None:
    plain, model = fused("qwen3")
    asked = {**GREEDY, "prompt_lookup_num_tokens": 3, "return_dict_in_generate": True, "output_hidden_states": True}
    expected, got = (m.generate(repeating, **asked) for m in (plain, model))
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.hidden_states) == len(expected.hidden_states)
    assert counts_of(model)["steps"] == 0


def test_an_assistant_model_goes_transformers_way(fused: Any, repeating: torch.Tensor) -> None:
    plain, model = fused("qwen3")
    expected = plain.generate(repeating, **GREEDY)
    assert torch.equal(model.generate(repeating, assistant_model=plain, **GREEDY), expected)


def test_nothing_is_guessed_where_guesses_were_wrong(
    fused: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup.NgramIndex, "following", lambda self, count: (1, [511] * count))
    plain, model = fused("qwen3")
    prompt = token_rows(1, 20)
    got = model.generate(prompt, prompt_lookup_num_tokens=7, **GREEDY)
    assert torch.equal(got, plain.generate(prompt, **GREEDY))
    assert counts_of(model)["guesses"] < 8
    assert counts_of(model)["steps"] == 39
