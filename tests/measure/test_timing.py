"""Interleaved timing: what is run, in which order, how often, and what is made of it. No real times are asserted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llmopt.measure import timing
from llmopt.measure.timing import Plan, Samples


class Clocked:
    """A model whose ``generate`` takes exactly the milliseconds it is told, on a clock of its own."""

    def __init__(self, name: str, clock: Clock, *, first_ms: float = 8.0, token_ms: float = 2.0) -> None:
        self.name, self.clock, self.first_ms, self.token_ms = name, clock, first_ms, token_ms
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompt: torch.Tensor, *, streamer: Any, max_new_tokens: int, **settings: Any) -> None:
        self.calls.append({"prompt": prompt, "max_new_tokens": max_new_tokens, **settings})
        self.clock.order.append(self.name)
        streamer.put(prompt)
        self.clock.now += self.first_ms * 1e-3
        streamer.put(torch.tensor([1]))
        for _ in range(max_new_tokens - 1):
            self.clock.now += self.token_ms * 1e-3
            streamer.put(torch.tensor([1]))
        streamer.end()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


PROMPT = torch.arange(5)[None]


def test_ttft_is_to_the_first_token_and_tpot_between_the_others(clock: Clock) -> None:
    model = Clocked("m", clock, first_ms=30, token_ms=4)
    ttft, tpot = timing.run_once(model, PROMPT, 9)
    assert ttft == pytest.approx(30)
    assert tpot == pytest.approx(4)
    call = model.calls[0]
    assert call["max_new_tokens"] == call["min_new_tokens"] == 9
    assert call["do_sample"] is False
    assert call["num_beams"] == 1
    assert torch.equal(call["attention_mask"], torch.ones(1, 5, dtype=torch.int64))


def test_two_tokens_are_enough(clock: Clock) -> None:
    assert timing.run_once(Clocked("m", clock), PROMPT, 2) == pytest.approx((8, 2))


def test_one_slow_token_does_not_move_tpot(clock: Clock) -> None:
    class Hiccup(Clocked):
        def generate(self, prompt: torch.Tensor, *, streamer: Any, max_new_tokens: int, **settings: Any) -> None:
            streamer.put(prompt)
            for i in range(max_new_tokens):
                self.clock.now += 0.5 if i == 3 else 0.002
                streamer.put(torch.tensor([1]))

    assert timing.run_once(Hiccup("m", clock), PROMPT, 8)[1] == pytest.approx(2)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_every_round_runs_every_stage_once_starting_with_another(stages: int, clock: Clock) -> None:
    models = {f"s{i}": Clocked(f"s{i}", clock, token_ms=1.0 + i) for i in range(stages)}
    plan = Plan(decode_tokens=4, min_rounds=2, max_rounds=7, budget_s=1e9)
    samples = timing.interleaved({n: (lambda m=m: m) for n, m in models.items()}, PROMPT, plan)
    names = list(models)
    # the first pass is warm-up
    assert clock.order[:stages] == names
    rounds = [clock.order[i : i + stages] for i in range(stages, len(clock.order), stages)]
    assert len(rounds) == 7
    for done, order in enumerate(rounds):
        assert order == names[done % stages :] + names[: done % stages]
    for i, name in enumerate(names):
        assert samples[name].decode_ms == pytest.approx([1.0 + i] * 7)
        assert samples[name].prefill_ms == pytest.approx([8.0] * 7)
        assert len(models[name].calls) == 8


def test_the_budget_ends_it_but_never_before_the_fewest_rounds(clock: Clock) -> None:
    def rounds(budget_s: float, **plan: Any) -> int:
        model = Clocked("m", clock, first_ms=500, token_ms=500)
        # 4 tokens: two seconds a round
        samples = timing.interleaved({"m": lambda: model}, PROMPT, Plan(decode_tokens=4, budget_s=budget_s, **plan))
        return len(samples["m"].decode_ms)

    assert rounds(0.0, min_rounds=3, max_rounds=9) == 3
    assert rounds(10.0, min_rounds=3, max_rounds=9) == 5
    assert rounds(1e9, min_rounds=3, max_rounds=9) == 9
    assert rounds(0.0, min_rounds=9, max_rounds=4) == 4
    assert rounds(0.0, min_rounds=0, max_rounds=4) == 1


def test_warm_up_is_shorter_and_thrown_away(clock: Clock) -> None:
    model = Clocked("m", clock)
    timing.interleaved({"m": lambda: model}, PROMPT, Plan(decode_tokens=16, min_rounds=1, max_rounds=1))
    assert [c["max_new_tokens"] for c in model.calls] == [4, 16]
    short = Clocked("m", clock)
    timing.interleaved({"m": lambda: short}, PROMPT, Plan(decode_tokens=3, min_rounds=1, max_rounds=1))
    assert [c["max_new_tokens"] for c in short.calls] == [2, 3]


def test_rounds_are_announced_and_ceilings_taken_within_them(clock: Clock) -> None:
    seen: list[Any] = []
    model = Clocked("m", clock)
    timing.interleaved(
        {"m": lambda: model}, PROMPT, Plan(min_rounds=3, max_rounds=3), every_round=lambda: seen.append("ceiling"),
        on_round=lambda done, most: seen.append((done, most)),
    )  # fmt: skip
    assert seen == ["ceiling", (1, 3), "ceiling", (2, 3), "ceiling", (3, 3)]


def test_a_stage_is_shown_right_before_it_runs(clock: Clock) -> None:
    shown: list[str] = []
    model = Clocked("m", clock)

    def show(name: str) -> Any:
        def now() -> Any:
            shown.append(name)
            clock.order.append(f"show {name}")
            return model

        return now

    timing.interleaved({"a": show("a"), "b": show("b")}, PROMPT, Plan(min_rounds=2, max_rounds=2))
    assert clock.order[::2] == [f"show {n}" for n in shown]


def test_a_request_is_the_prompt_and_its_tokens() -> None:
    samples = Samples([10.0, 20.0], [1.0, 2.0])
    assert samples.request_ms(100) == [110.0, 220.0]
    ratio = timing.request_ratio(samples, Samples([10.0, 20.0], [0.5, 1.0]), 100)
    assert ratio.value == pytest.approx(110 / 60)
    gain = timing.gain(samples, Samples([5.0, 10.0], [1.0, 2.0]))
    assert gain.prefill.value == 2
    assert gain.decode.value == 1
    timed = samples.timing(128, 16)
    assert (timed.prefill_ms.value, timed.decode_ms.value) == (15.0, 1.5)
    assert (timed.prompt_tokens, timed.decode_tokens, timed.decode_ms.rounds) == (128, 16, 2)
    assert timed.decode_tok_per_s == pytest.approx(1000 / 1.5)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2"])
def test_a_real_model_is_timed_through_generate(family: str, tiny: Any, token_rows: Any) -> None:
    model = tiny(family)
    # what real checkpoints bring along: end of sequence, sampling, several sequences
    model.generation_config.eos_token_id = list(range(1, 500))
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.6
    model.generation_config.num_return_sequences = 2
    model.generation_config.repetition_penalty = 1.1
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    ttft, tpot = timing.run_once(model, token_rows(1, 9), 6)
    handle.remove()
    assert lengths == [9, 1, 1, 1, 1, 1]
    assert ttft > 0
    assert tpot > 0
    assert math.isfinite(ttft + tpot)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("old", "new", "plain"),
    [
        ([4.0] * 4, [1.0] * 4, True),
        ([1.0] * 4, [4.0] * 4, True),
        ([4.0] * 3, [1.0] * 3, False),
        ([4.0, 4.0, 4.0, 1.2], [1.0] * 4, False),
        ([1.05] * 20, [1.0] * 20, False),
        ([4.0, 4.0, 1.0, 1.0], [1.0, 1.0, 4.0, 4.0], False),
    ],
    ids=["faster", "slower", "too few rounds", "one round says less", "a small difference", "rounds disagree"],
)
def test_only_agreement_far_beyond_noise_is_plain(old: list[float], new: list[float], plain: bool) -> None:
    assert timing.is_plain(Samples(old, old), Samples(new, new), 128) is plain


def test_enough_ends_a_run_before_its_fewest_rounds(clock: Clock) -> None:
    models = {"a": Clocked("a", clock), "b": Clocked("b", clock, token_ms=1.0)}
    samples = timing.interleaved(
        {name: lambda m=m: m for name, m in models.items()}, PROMPT, Plan(decode_tokens=4, min_rounds=9),
        enough=lambda s: len(s["b"].decode_ms) == 2,
    )  # fmt: skip
    assert [len(s.decode_ms) for s in samples.values()] == [2, 2]
