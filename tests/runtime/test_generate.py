"""generate on a fused model: the tokens of the model as it was, for every way of asking for them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, logits_process
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import llmopt
from llmopt import native
from llmopt.models import FAMILIES
from llmopt.runtime import generate as loop
from llmopt.runtime import screen
from llmopt.runtime.cache import KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.step import DecodeStep

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SAMPLED: dict[str, Any] = {**GREEDY, "do_sample": True}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every recorded step that runs: the loop under test is ours and not transformers'."""
    ran: list[int] = []
    run = DecodeStep.run

    def counted(self: DecodeStep) -> None:
        ran.append(len(self.ids))
        run(self)

    monkeypatch.setattr(DecodeStep, "run", counted)
    return ran


def padded(rows: torch.Tensor, padding: list[int]) -> torch.Tensor:
    mask = torch.ones_like(rows)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return mask


@every_family
def test_greedy_tokens_agree(family: str, fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused(family)
    prompt = token_rows(1, 21)
    expected = plain.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    for _ in range(2):
        steps.clear()
        assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY), expected)
        assert steps == [1] * 23


@every_family
def test_batches_with_left_padding_agree(family: str, fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused(family)
    prompt = token_rows(4, 19, seed=5)
    mask = padded(prompt, [0, 7, 18, 3])
    expected = plain.generate(prompt, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **GREEDY), expected)
    assert set(steps) == {4}


@pytest.mark.parametrize("sequences", [23, 24, 70])
@every_family
def test_large_batches_agree(family: str, sequences: int, fused: Any, token_rows: Any, steps: list[int]) -> None:
    # many tokens of weights that are not packed are torch's business in a prefill; a recorded step must hold them too
    plain, model = fused(family)
    prompt = token_rows(sequences, 9, seed=6)
    mask = torch.ones_like(prompt)
    expected = plain.generate(prompt, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **GREEDY), expected)
    assert set(steps) == {sequences}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"num_return_sequences": 3},
        {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "renormalize_logits": True},
        {"temperature": 0.9, "top_k": 30, "typical_p": 0.8},
        {"top_k": 0, "temperature": 1.3, "min_new_tokens": 9},
        {"top_k": 0, "top_p": 0.7, "min_p": 0.01, "prompt_lookup_num_tokens": None},
    ],
    ids=lambda o: ",".join(o),
)
def test_sampled_tokens_agree_under_one_seed(
    options: dict[str, Any], fused: Any, token_rows: Any, steps: list[int]
) -> None:
    plain, model = fused("qwen3")
    prompt = token_rows(2, 17)
    found = []
    for each in (plain, model):
        torch.manual_seed(11)
        found.append(each.generate(prompt, attention_mask=torch.ones_like(prompt), **{**SAMPLED, **options}))
    assert torch.equal(*found)
    assert steps


def test_a_step_draws_by_itself_and_serves_greedy_calls_too(
    fused: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = fused("qwen3")
    prompt = token_rows(2, 17)
    usual = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    calls = [{**SAMPLED, **usual}, GREEDY, {**SAMPLED, "temperature": 1.5}, GREEDY, {**SAMPLED, **usual}]
    expected = []
    for options in calls:
        torch.manual_seed(4)
        expected.append(plain.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    for warper in ("Temperature", "TopK", "TopP", "MinP"):
        kind = getattr(logits_process, f"{warper}LogitsWarper")
        monkeypatch.setattr(kind, "__call__", lambda *_: pytest.fail("the step draws"))
    recorded: list[DecodeStep] = []
    program = Engine.program
    monkeypatch.setattr(Engine, "program", lambda self, step: (recorded.append(step), program(self, step))[1])
    # one step over one cache, recorded once for each way of choosing, when a call first asks for it
    for options, want, programs in zip(calls, expected, (1, 2, 2, 2, 2), strict=True):
        torch.manual_seed(4)
        assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), want)
        assert len(recorded) == programs
    assert len(set(map(id, recorded))) == 1


def test_a_processor_of_the_callers_own_sees_what_transformers_shows_it(fused: Any, token_rows: Any) -> None:
    class Shown(logits_process.LogitsProcessor):
        def __init__(self) -> None:
            self.scores: list[torch.Tensor] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.scores.append(scores)
            return scores.double() * 0.5

    plain, model = fused("qwen3")
    prompt, found = token_rows(1, 17), []
    for each in (plain, model):
        torch.manual_seed(4)
        shown = Shown()
        tokens = each.generate(
            prompt, attention_mask=torch.ones_like(prompt), logits_processor=LogitsProcessorList([shown]),
            **{**SAMPLED, "temperature": 0.8, "top_k": 20},
        )  # fmt: skip
        found.append((tokens, shown.scores))
    (expected, wanted), (got, seen) = found
    assert torch.equal(got, expected)
    torch.testing.assert_close(torch.cat(seen), torch.cat(wanted), rtol=0, atol=1e-4)


def test_scores_logits_and_cache_are_returned(fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused("qwen3")
    prompt = token_rows(2, 13)
    asked = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, got = (m.generate(prompt, attention_mask=torch.ones_like(prompt), **asked) for m in (plain, model))
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name]) == 24
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert isinstance(got.past_key_values, KVCache)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert steps


def test_a_returned_cache_is_not_used_again(fused: Any, token_rows: Any) -> None:
    _, model = fused("qwen3")
    prompt = token_rows(1, 13)
    kept = model.generate(prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **GREEDY)
    before = [k.clone() for k in kept.past_key_values.keys]
    model.generate(token_rows(1, 13, seed=9), attention_mask=torch.ones_like(prompt), **GREEDY)
    for a, b in zip(before, kept.past_key_values.keys, strict=True):
        assert torch.equal(a[:, :, :36], b[:, :, :36])


def test_a_conversation_goes_on_in_its_cache(fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused("qwen3")
    found = []
    for each in (plain, model):
        first = each.generate(token_rows(1, 13), return_dict_in_generate=True, **GREEDY)
        longer = torch.cat([first.sequences, token_rows(1, 5, seed=2)], -1)
        found.append(each.generate(longer, past_key_values=first.past_key_values, **GREEDY))
    assert torch.equal(*found)
    assert len(steps) > 23


def test_the_end_token_ends_a_sequence_and_the_rest_is_padding(fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused("qwen3")
    prompt = token_rows(3, 12, seed=4)
    free = plain.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)[:, 12:]
    asked = {**GREEDY, "eos_token_id": [int(free[0, 5]), int(free[1, 9])]}
    expected, got = (m.generate(prompt, attention_mask=torch.ones_like(prompt), **asked) for m in (plain, model))
    assert torch.equal(got, expected)
    steps.clear()
    asked = {**asked, "min_new_tokens": 16}
    expected, got = (m.generate(prompt, attention_mask=torch.ones_like(prompt), **asked) for m in (plain, model))
    assert torch.equal(got, expected)
    assert steps


class Seen(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_prompt_and_tokens(fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused("qwen3")
    prompt = token_rows(1, 9)
    seen = [Seen(), Seen()]
    for each, streamer in zip((plain, model), seen, strict=True):
        each.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **GREEDY)
    assert seen[0].pieces == seen[1].pieces
    assert seen[1].ended
    assert steps


class After(StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 15)


def test_own_stopping_criteria_are_asked(fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused("qwen3")
    asked = {**GREEDY, "stopping_criteria": StoppingCriteriaList([After()])}
    expected, got = (m.generate(token_rows(2, 9), **asked) for m in (plain, model))
    assert torch.equal(got, expected)
    assert got.shape[1] == 15
    assert steps


def test_stop_strings_stop(trained: Any, steps: list[int]) -> None:
    from transformers import AutoTokenizer

    import llmopt

    model = trained("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    prompt = tokenizer("The ", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(prompt, **GREEDY)[0, prompt.shape[1] :])
    stop = text[8:11]
    expected = model.generate(prompt, stop_strings=[stop], tokenizer=tokenizer, **GREEDY)
    llmopt.optimize(model, passes=["fuse_kernels"], measure=False)
    assert torch.equal(model.generate(prompt, stop_strings=[stop], tokenizer=tokenizer, **GREEDY), expected)
    assert expected.shape[1] < prompt.shape[1] + 24
    assert steps
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(prompt, stop_strings=[stop], **GREEDY)


def test_calls_that_transformers_loop_decodes_are_counted_and_logged_once(
    fused: Any, token_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, model = fused("qwen3")
    counts = llmopt.report(model).passes[0].details["fallbacks_to_own_loop"]
    prompt = token_rows(1, 9)
    given = {"attention_mask": torch.ones_like(prompt), **GREEDY, "max_new_tokens": 3}
    model.generate(prompt, **given)
    assert counts == {}
    for _ in range(2):
        model.generate(prompt, **given, num_beams=2)
    model.generate(prompt, **given, use_cache=False)
    assert counts == {"generation mode beam_search": 2, "no cache of ours": 1}
    assert [r.getMessage().count("transformers' own loop decodes") for r in caplog.records].count(1) == 2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=["beams", "sampled"])
def test_beam_search_goes_transformers_way(
    options: dict[str, Any], fused: Any, token_rows: Any, steps: list[int]
) -> None:
    plain, model = fused("qwen3")
    found = []
    for each in (plain, model):
        torch.manual_seed(2)
        found.append(each.generate(token_rows(2, 11), **{**GREEDY, **options}))
    assert torch.equal(*found)
    assert steps == []


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"output_hidden_states": True}], ids=str
)
def test_what_is_not_covered_agrees_too(options: dict[str, Any], fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused("qwen3")
    asked = {**GREEDY, "return_dict_in_generate": True, **options}
    expected, got = (m.generate(token_rows(1, 11), **asked) for m in (plain, model))
    assert torch.equal(got.sequences, expected.sequences)
    assert steps == []


def test_a_generation_config_counts(fused: Any, token_rows: Any, steps: list[int]) -> None:
    plain, model = fused("qwen3")
    config = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, repetition_penalty=1.5)
    expected, got = (m.generate(token_rows(1, 11), generation_config=config) for m in (plain, model))
    assert torch.equal(got, expected)
    assert steps


def test_a_short_cache_grows(fused: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = fused("qwen3")
    take = loop.Generation._take_cache
    monkeypatch.setattr(loop.Generation, "_take_cache", lambda self, n, capacity: take(self, n, 4))
    assert torch.equal(model.generate(token_rows(1, 11), **GREEDY), plain.generate(token_rows(1, 11), **GREEDY))


def test_a_prompt_longer_than_a_chunk(fused: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.runtime import engine

    plain, model = fused("ernie4_5_moe")
    monkeypatch.setattr(engine, "CHUNK_TOKENS", 16)
    prompt = token_rows(3, 70)
    mask = padded(prompt, [0, 33, 5])
    expected, got = (m.generate(prompt, attention_mask=mask, **GREEDY) for m in (plain, model))
    assert torch.equal(got, expected)


def test_callers_in_two_threads_get_their_own_tokens(fused: Any, token_rows: Any) -> None:
    plain, model = fused("qwen3")
    prompts = [token_rows(1, 12, seed=s) for s in range(4)]
    expected = [plain.generate(p, **GREEDY) for p in prompts]
    got: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = model.generate(prompts[i], **GREEDY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        assert torch.equal(got[i], expected[i])


def test_a_copy_generates_by_itself(fused: Any, token_rows: Any) -> None:
    _, model = fused("deepseek_v3")
    expected = model.generate(token_rows(1, 12), **GREEDY)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other.generate(token_rows(1, 12), **GREEDY), expected)


# ---- the screened head


def quantized(tiny: Any, token_rows: Any, screened: bool) -> Any:
    from llmopt.passes import FuseKernels, QuantizeGptq

    model = tiny("qwen3")
    passes = [QuantizeGptq(group_size=64), FuseKernels(screened_head=screened)]
    llmopt.optimize(model, passes=passes, measure=False, calibration=token_rows(4, 24))
    return model


@pytest.mark.parametrize("batch", [1, 3, screen.MOST_SEQUENCES + 1])
def test_a_screened_head_gives_the_same_tokens(
    batch: int, tiny: Any, token_rows: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.available():
        pytest.skip("no compiled kernels")
    models = [quantized(tiny, token_rows, screened) for screened in (False, True)]
    screens: list[int] = []
    greedy = Engine.greedy
    monkeypatch.setattr(Engine, "greedy", lambda *given: (screens.append(len(given[1])), greedy(*given)))
    prompt = token_rows(batch, 12, seed=4)
    given = {"attention_mask": torch.ones_like(prompt), **GREEDY}
    expected, got = (m.generate(prompt, **given) for m in models)
    assert torch.equal(got, expected)
    # recorded once, by the one that screens, up to its largest batch
    assert screens == ([batch] if batch <= screen.MOST_SEQUENCES else [])
    assert steps == [batch] * 46
    ends = {**given, "eos_token_id": [int(expected[0, 17])], "min_new_tokens": 16}
    assert torch.equal(*(m.generate(prompt, **ends) for m in models))


@pytest.mark.parametrize(
    "asked",
    [{"do_sample": True}, {"repetition_penalty": 1.2}, {"return_dict_in_generate": True, "output_logits": True}],
    ids=str,
)
def test_whoever_looks_at_logits_gets_all_of_them(
    asked: dict[str, Any], tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.available():
        pytest.skip("no compiled kernels")
    prompt, found = token_rows(2, 12, seed=4), []
    for screened in (False, True):
        model = quantized(tiny, token_rows, screened)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)  # leaves a step behind
        monkeypatch.setattr(Engine, "greedy", None)
        torch.manual_seed(3)
        found.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **{**GREEDY, **asked}))
        monkeypatch.undo()
    if isinstance(found[0], torch.Tensor):
        assert torch.equal(*found)
    else:
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert all(torch.equal(a, b) for a, b in zip(found[0].logits, found[1].logits, strict=True))
