"""The loop: verdicts, roll-back, events, bad input, and what an optimized model can still do."""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import llmopt
from llmopt import loop
from llmopt.errors import CalibrationError, InputError, ModelStateError, PassError, QuantizationError
from llmopt.measure import ceilings, timing
from llmopt.measure.report import Interval, Report
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes import PASSES, QuantizeGptq
from llmopt.passes.base import Applied, Coverage, Event, Pass, PassContext, Patch, Phase, Swap, Verdict

FAMILY_NAMES = [f.model_type for f in FAMILIES]
SMALL_GPTQ = QuantizeGptq(group_size=64)


# ---- artificial passes


@dataclass(frozen=True)
class Artificial(Pass):
    """Wraps the forward of one decoder layer: ``after(output)`` stands for its output."""

    name = "artificial"
    phase = Phase.RUNTIME

    after: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    layer: int = 1
    delay_ms: float = 0.0  # what the artificial clock charges while the pass is on
    reason: str = ""  # why it does not apply
    apply_error: BaseException | None = None
    enable_error: BaseException | None = None
    changes_numerics: bool = False
    needs: bool = False
    seen: list[str] = field(default_factory=list, compare=False)

    def check(self, ctx: PassContext) -> Verdict:
        self.seen.append("check")
        return Verdict(not self.reason, self.reason)

    def apply(self, ctx: PassContext) -> Applied:
        self.seen.append("apply")
        if self.apply_error is not None:
            raise self.apply_error
        module = ctx.resolved.layers[self.layer].module
        forward, after = module.forward, self.after

        def wrapped(*args: Any, **named: Any) -> Any:
            out = forward(*args, **named)
            return (after(out[0]), *out[1:]) if isinstance(out, tuple) else after(out)

        def enabled() -> None:
            if self.enable_error is not None:
                raise self.enable_error

        swaps = [Swap(module, "forward", wrapped), Swap(ctx.model, "test_delay_ms", self.delay_ms)]
        return Applied(
            Patch(swaps, on_enable=enabled), Coverage(touched=1, implementations={"layer": "wrapped"}), {"own": 1},
            changes_numerics=self.changes_numerics,
        )  # fmt: skip

    def options(self) -> dict[str, Any]:
        return {"layer": self.layer}


@dataclass(frozen=True)
class Second(Artificial):
    name = "second"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages take 20 ms for a prompt and 10 ms a token, give or take 1%, plus what the stage's pass charges."""
    noise = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def run_once(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        model(input_ids=prompt[:, :4], use_cache=False)
        extra = getattr(model, "test_delay_ms", 0.0)
        jitter = 1 + 0.01 * torch.randn(2, generator=noise)
        return float(jitter[0]) * (20 + extra), float(jitter[1]) * (10 + extra)

    monkeypatch.setattr(timing, "run_once", run_once)
    monkeypatch.setattr(ceilings, "usable_meter", lambda: None)


@pytest.fixture
def short_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real time, few tokens and rounds."""
    plan = timing.Plan

    def quick(decode_tokens: int = 3, **_: Any) -> timing.Plan:
        return plan(prompt_tokens=8, decode_tokens=3, min_rounds=3, max_rounds=3)

    monkeypatch.setattr(timing, "Plan", quick)
    monkeypatch.setattr(ceilings, "usable_meter", lambda: None)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return out


def row_of(model: Any, name: str = "artificial") -> Any:
    return next(row for row in llmopt.report(model).passes if row.name == name)


@pytest.fixture
def unchanged(same_bits: Any, snapshot: Any, token_rows: Any) -> Callable[[Any], Callable[[], bool]]:
    """``check = unchanged(model)`` before, ``check()`` after: same bits, objects, settings, logits, and no state kept."""

    def start(model: Any) -> Callable[[], bool]:
        before, ids = snapshot(model), token_rows(2, 12, seed=9)
        expected, config = logits(model, ids), {k: repr(v) for k, v in vars(model.config).items()}
        objects = {n: id(m) for n, m in model.named_modules()} | {n: id(p) for n, p in model.named_parameters()}

        def check() -> bool:
            now = {n: id(m) for n, m in model.named_modules()} | {n: id(p) for n, p in model.named_parameters()}
            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
            with pytest.raises(InputError, match="not optimized"):
                llmopt.report(model)
            return (
                now == objects and hooks == 0 and not hasattr(model, "test_delay_ms")
                and {k: repr(v) for k, v in vars(model.config).items()} == config
                and same_bits(model.state_dict(), before) and torch.equal(logits(model, ids), expected)
            )  # fmt: skip

        return check

    return start


def mixed(out: torch.Tensor) -> torch.Tensor:
    """Not the layer's output (scaling it would change nothing: a norm comes next)."""
    return out + 0.3 * out.roll(1, -1)


def as_trained(model: Any) -> Any:
    """Random weights treated as trained ones: quality counts, and text is needed."""
    del model.llmopt_random_weights
    return model


# ---- verdicts


def test_a_pass_that_does_nothing_makes_no_difference(tiny: Any, clock: None) -> None:
    model = tiny("qwen3")
    assert llmopt.optimize(model, [Artificial()]) is model
    row = row_of(model)
    assert row.verdict == "kept"
    assert row.reason.startswith("no difference beyond noise: 1.00x [")


def test_a_delay_is_slower_and_undone(tiny: Any, clock: None, token_rows: Any) -> None:
    model, ids = tiny("qwen3"), token_rows(2, 16)
    expected = logits(model, ids)
    llmopt.optimize(model, [Artificial(delay_ms=0.5)])
    row = row_of(model)
    assert row.verdict == "undone"
    assert row.reason.startswith("slower: a request of 128 + 128 tokens runs at 0.95x [")
    assert not hasattr(model, "test_delay_ms")
    assert torch.equal(logits(model, ids), expected)
    assert row.marginal.decode.high < 1
    assert row.details["request_ratio"]["value"] == pytest.approx(1300 / 1364, rel=0.02)


def test_a_gain_is_kept_and_paired_with_the_stage_before(tiny: Any, clock: None) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, [Artificial(delay_ms=-5.0), Second(delay_ms=-8.0)])
    first, second = row_of(model), row_of(model, "second")
    assert first.reason.startswith("faster: ")
    assert second.reason.startswith("faster: ")
    assert first.marginal.decode.value == pytest.approx(10 / 5, rel=0.03)
    assert second.marginal.decode.value == pytest.approx(5 / 2, rel=0.03)
    assert second.total.decode.value == pytest.approx(10 / 2, rel=0.03)
    assert second.break_even_tokens == pytest.approx(second.apply_s * 1000 / 3, rel=0.1)


def test_a_pass_that_really_sleeps_is_undone(tiny: Any, short_plan: None) -> None:
    def sleep(out: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return out

    model = tiny("qwen3")
    llmopt.optimize(model, [Artificial(after=sleep)])
    row = row_of(model)
    assert row.verdict == "undone"
    assert row.reason.startswith("slower: ")
    report = llmopt.report(model)
    assert report.baseline is not None
    assert report.baseline.decode_ms.rounds == 3
    assert report.baseline.prefill_ms.value > 0
    assert row.timing.decode_ms.value > 50


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict", "says"),
    [
        (1.5, 1.4, 1.6, "kept", "faster"),
        (0.9, 0.85, 0.95, "undone", "slower"),
        (0.9, 0.7, 1.1, "kept", "no difference"),
        (1.1, 0.9, 1.3, "kept", "no difference"),
        (0.995, 0.99, 0.999, "kept", "no difference"),
        (1.005, 1.001, 1.009, "kept", "no difference"),
    ],
    ids=["faster", "slower", "noisy_slower", "noisy_faster", "within_margin", "within_margin_faster"],
)
def test_judging_speed(value: float, low: float, high: float, verdict: str, says: str) -> None:
    found, reason = loop.judge_speed(Interval(value, low, high, 9), 128, 64)
    assert found == verdict
    assert reason.startswith(says)


def test_changed_outputs_undo_an_exact_pass(tiny: Any, clock: None, token_rows: Any) -> None:
    model, ids = tiny("qwen3"), token_rows(2, 16)
    expected = logits(model, ids)
    llmopt.optimize(model, [Artificial(after=mixed)])
    row = row_of(model)
    assert row.verdict == "undone"
    assert row.reason.startswith("outputs changed: mean KL ")
    assert row.timing is None
    assert torch.equal(logits(model, ids), expected)


def test_last_bits_may_move(tiny: Any, clock: None) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, [Artificial(after=lambda out: out * (1 + 1e-6))])
    assert row_of(model).verdict == "kept"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "quantizing"])
def test_nan_names_the_first_layer_that_holds_it(bad: float, exact: bool, tiny: Any, clock: None) -> None:
    model = tiny("llama")

    def spoil(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[..., -1, 0] = bad
        return out

    llmopt.optimize(model, [Artificial(after=spoil, layer=1, changes_numerics=not exact)])
    row = row_of(model)
    assert row.verdict == "undone"
    assert row.reason == "outputs hold NaN or Inf in model.layers.1"


def test_the_quality_budget_decides_over_passes_that_change_outputs(tiny: Any, clock: None, token_rows: Any) -> None:
    verdicts = []
    for budget in (1e-6, None, 10.0):
        model = as_trained(tiny("qwen3"))
        llmopt.optimize(
            model, [Artificial(after=mixed, changes_numerics=True)], calibration=token_rows(12, 64),
            quality_budget=budget,
        )  # fmt: skip
        row = row_of(model)
        verdicts.append(row.verdict)
        assert row.quality.mean_kl > 1e-6
        assert row.reason.startswith("outside the quality budget: mean KL" if budget == 1e-6 else "no difference")
    assert verdicts == ["undone", "kept", "kept"]


# ---- failures

FAILURES = [
    QuantizationError("model.layers.0: weight holds NaN or Inf"),
    RuntimeError("out of luck"),
    ValueError("cannot"),
    MemoryError("no room"),
    ZeroDivisionError("by zero"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["apply_error", "enable_error"])
def test_a_pass_that_fails_becomes_a_row(
    where: str, error: Exception, tiny: Any, clock: None, unchanged: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("qwen3")
    check = unchanged(model)
    last = Second(delay_ms=-5.0)
    with caplog.at_level(logging.WARNING, "llmopt"):
        llmopt.optimize(model, [Artificial(**{where: error}), last])
    row = row_of(model)
    assert row.verdict == "undone"
    assert row.reason == f"failed, model rolled back: {error}"
    assert str(error) in caplog.text
    assert row_of(model, "second").verdict == "kept"
    llmopt.restore(model)
    assert check()


@pytest.mark.parametrize("measure", [True, False], ids=["measured", "unmeasured"])
@pytest.mark.parametrize("where", ["apply_error", "enable_error"])
def test_strict_makes_a_failure_an_error(where: str, measure: bool, tiny: Any, clock: None, unchanged: Any) -> None:
    model = tiny("qwen3")
    check = unchanged(model)
    cause = QuantizationError("model.layers.0: weight holds NaN or Inf")
    passes = [SMALL_GPTQ, Artificial(**{where: cause})]
    with pytest.raises(PassError, match="artificial: undone: failed, model rolled back") as caught:
        llmopt.optimize(model, passes, strict=True, measure=measure)
    assert caught.value.__cause__ is cause
    assert check()


def test_a_pass_that_fails_when_it_runs_becomes_a_row(tiny: Any, clock: None, unchanged: Any) -> None:
    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the kernel refuses these shapes")

    model = tiny("qwen3")
    check = unchanged(model)
    llmopt.optimize(model, [Artificial(after=fail), Second(delay_ms=-5.0)])
    row = row_of(model)
    assert row.verdict == "undone"
    assert "the kernel refuses these shapes" in row.reason
    assert row_of(model, "second").verdict == "kept"
    llmopt.restore(model)
    assert check()


@pytest.mark.parametrize("error", [KeyError("a mistake"), TypeError("a mistake"), SystemExit(3), KeyboardInterrupt()],
                         ids=lambda e: type(e).__name__)  # fmt: skip
@pytest.mark.parametrize("where", ["apply_error", "enable_error"])
def test_mistakes_and_interrupts_come_through_on_a_model_as_given(
    where: str, error: BaseException, tiny: Any, clock: None, unchanged: Any
) -> None:
    model = tiny("qwen3")
    check = unchanged(model)
    with pytest.raises(type(error)):
        llmopt.optimize(model, [SMALL_GPTQ, Artificial(**{where: error})])
    assert check()


def test_a_pass_that_does_not_apply_says_why(tiny: Any, clock: None) -> None:
    model = tiny("qwen3")
    item = Artificial(reason="needs a flux capacitor")
    llmopt.optimize(model, [item])
    row = row_of(model)
    assert (row.verdict, row.reason) == ("not applicable", "needs a flux capacitor")
    assert row.timing is None
    assert item.seen == ["check"]


def test_strict_wants_every_pass_to_apply(tiny: Any, clock: None, unchanged: Any) -> None:
    model = tiny("qwen3")
    check = unchanged(model)
    with pytest.raises(PassError, match="artificial: not applicable: needs a flux capacitor"):
        llmopt.optimize(model, [SMALL_GPTQ, Artificial(reason="needs a flux capacitor")], strict=True)
    assert check()


# ---- events


def events_of(model: Any, passes: list[Pass], **settings: Any) -> list[Event]:
    events: list[Event] = []
    llmopt.optimize(model, passes, on_event=events.append, **settings)
    return events


def test_events_tell_the_story(tiny: Any, clock: None, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("qwen3")
    events = events_of(model, [SMALL_GPTQ, Artificial(delay_ms=0.5), Second(reason="no reason")])
    assert all(isinstance(e, Event) for e in events)
    assert (events[0].kind, events[0].name) == ("stage", "baseline")
    verdicts = {e.name: e.message for e in events if e.kind == "verdict"}
    assert list(verdicts) == ["quantize_gptq", "artificial", "second"]
    assert verdicts["quantize_gptq"].startswith("kept: ")
    assert verdicts["artificial"].startswith("undone: slower")
    assert verdicts["second"] == "not applicable: no reason"
    layers = [
        e for e in events if e.name == "quantize_gptq" and e.kind == "progress" and e.message.startswith("model.")
    ]
    assert [(e.done, e.total) for e in layers] == [(0, 2), (1, 2)]
    rounds = [e.done for e in events if e.name == "receipt"]
    assert rounds == list(range(1, len(rounds) + 1))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_callback_that_raises_at_any_event_leaves_the_model_as_given(
    tiny: Any, clock: None, unchanged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one round of everything: as many kinds of events, fewer of each
    plan = timing.Plan
    monkeypatch.setattr(timing, "Plan", lambda **_: plan(prompt_tokens=8, decode_tokens=2, min_rounds=1, max_rounds=1))
    model = tiny("ernie4_5")
    check = unchanged(model)
    passes: list[Pass] = [SMALL_GPTQ, Artificial(delay_ms=5.0)]
    total = len(events_of(model, passes))
    llmopt.restore(model)
    for at in range(total):
        count = iter(range(total))
        error: type[BaseException] = (ValueError, KeyboardInterrupt)[at % 2]

        def raising(event: Event, count: Any = count, at: int = at, error: type[BaseException] = error) -> None:
            if next(count) == at:
                raise error("from the callback")

        with pytest.raises(error, match="from the callback"):
            llmopt.optimize(model, passes, on_event=raising)
        assert check(), at


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"measure": "yes"}, "measure"),
        ({"measure": None}, "measure"),
        ({"measure": 2}, "measure"),
        ({"measure": 0}, "measure"),
        ({"measure": 1.0}, "measure"),
        ({"quality_budget": 0}, "quality_budget"),
        ({"quality_budget": -1.0}, "quality_budget"),
        ({"quality_budget": float("nan")}, "quality_budget"),
        ({"quality_budget": "0.1"}, "quality_budget"),
        ({"on_event": 5}, "on_event"),
        ({"passes": ["quantise_gptq"]}, "passes"),
        ({"passes": [QuantizeGptq, "x"]}, "passes"),
        ({"passes": ["quantize_gptq", "quantize_gptq"]}, "passes"),
        ({"passes": 5}, "passes"),
    ],
    ids=lambda v: str(v)[:40].replace(" ", ""),
)
def test_bad_arguments_are_named_before_any_work(
    settings: dict[str, Any], named: str, tiny: Any, unchanged: Any
) -> None:
    model = tiny("qwen3")
    check = unchanged(model)
    with pytest.raises(InputError, match=f"^{named}: "):
        llmopt.optimize(model, **({"passes": [SMALL_GPTQ]} | settings))
    assert check()


@pytest.mark.parametrize("given", [None, 5, "qwen3", nn.Linear(2, 2)], ids=["none", "number", "name", "module"])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"^model: "):
        llmopt.optimize(given)


BAD_CALIBRATION = {
    "empty": [],
    "empty_text": "",
    "one_token": [5],
    "one_token_tensor": torch.tensor([[7]]),
    "float": torch.rand(2, 40),
    "bool": torch.ones(2, 40, dtype=torch.bool),
    "three_dims": torch.ones(1, 2, 40, dtype=torch.long),
    "out_of_vocabulary": torch.full((2, 40), 512),
    "negative": torch.full((2, 40), -1),
    "text_without_tokenizer": "some text, and no tokenizer beside the weights",
    "unreadable": [object()],
    "ragged": [[[1, 2], [3]]],
    "number": 5,
    "bytes": b"some bytes",
    "other_mapping": {"tokens": [1, 2, 3]},
    "beyond_64_bits": [2**70, 1, 2],
}


@pytest.mark.parametrize("kind", BAD_CALIBRATION)
def test_bad_calibration_costs_nothing(kind: str, tiny: Any, unchanged: Any) -> None:
    model = tiny("qwen3")
    check = unchanged(model)
    events: list[Event] = []
    with pytest.raises(CalibrationError, match=r"^calibration: "):
        llmopt.optimize(model, [SMALL_GPTQ], calibration=BAD_CALIBRATION[kind], measure=False, on_event=events.append)
    assert events == []
    assert check()


def test_measuring_quality_needs_text_or_two_rows(tiny: Any, unchanged: Any, token_rows: Any) -> None:
    model = as_trained(tiny("qwen3"))
    check = unchanged(model)
    for calibration in (None, token_rows(1, 60)):
        with pytest.raises(CalibrationError, match=r"^calibration: "):
            llmopt.optimize(model, [SMALL_GPTQ], calibration=calibration)
        assert check()


def test_an_optimized_model_is_not_optimized_again(tiny: Any) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, [SMALL_GPTQ], measure=False)
    before = {n: b.clone() for n, b in model.named_buffers()}
    for passes in ([SMALL_GPTQ], [Artificial()], None):
        with pytest.raises(ModelStateError, match="already optimized"):
            llmopt.optimize(model, passes, measure=False)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    llmopt.restore(model)
    llmopt.optimize(model, [SMALL_GPTQ], measure=False)


def test_only_an_optimized_model_has_a_receipt(tiny: Any) -> None:
    model = tiny("qwen3")
    for function in (llmopt.report, llmopt.restore):
        with pytest.raises(InputError, match=r"^model: not optimized"):
            function(model)


# ---- the receipt


def test_the_receipt_of_a_whole_run(tiny: Any, clock: None) -> None:
    model = tiny("ernie4_5_moe")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    llmopt.optimize(model, [SMALL_GPTQ, Artificial(delay_ms=-2.0), Second(delay_ms=9.0)], measure="full", seed=4)
    report = llmopt.report(model)
    assert report.model["model_type"] == "ernie4_5_moe"
    assert report.model["weight_bytes"] == pytest.approx(weights, rel=1e-3)  # buffers count, and are small
    assert report.model["random_weights"] is True
    assert any(note.startswith("random weights: no quality figures") for note in report.notes)
    assert report.baseline_quality is None
    assert [r.name for r in report.passes] == ["quantize_gptq", "artificial", "second"]
    assert [r.verdict for r in report.passes] == ["kept", "kept", "undone"]
    assert [r.name for r in report.kept()] == ["quantize_gptq", "artificial"]
    assert report.settings["seed"] == 4
    assert report.settings["measure"] == "full"
    assert report.settings["calibration_tokens"] > 1000
    assert report.measured_s > 0
    for row in report.kept():
        assert row.quality is None
        assert row.timing.decode_ms.rounds == report.settings["rounds"] >= 6
        assert row.total is not None
        assert row.leave_one_out is not None
        assert 0 < row.memory.weights < weights
        assert row.details["decode_bytes_per_token"] > 0
    assert report.kept()[1].leave_one_out.decode.value == pytest.approx(10 / 8, rel=0.03)
    assert report.passes[0].coverage["touched"] > 10
    assert report.passes[0].options["group_size"] == 64


def test_quality_is_measured_on_rows_held_out(tiny: Any, clock: None, token_rows: Any) -> None:
    model = as_trained(tiny("qwen3"))
    llmopt.optimize(model, [SMALL_GPTQ], calibration=token_rows(32, 64))
    report = llmopt.report(model)
    assert report.baseline_quality.mean_kl == 0
    assert report.baseline_quality.perplexity_ratio == 1
    quality = report.passes[0].quality
    assert 0 < quality.mean_kl < 0.2
    assert quality.first_divergent_layer == "model.layers.0"
    assert quality.non_finite == []
    assert 0.5 < quality.top1_agreement <= 1
    # 2048 tokens in rows of 256: one held out, seven calibrated on
    assert quality.tokens == 256
    assert report.settings["calibration_tokens"] == 7 * 256
    assert any("held out" in note for note in report.notes)


def test_own_calibration_does_not_hide_that_weights_are_random(tiny: Any, clock: None, token_rows: Any) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, [SMALL_GPTQ], calibration=token_rows(12, 64))
    report = llmopt.report(model)
    assert report.passes[0].quality is None
    assert any("no quality figures" in note for note in report.notes)


def test_json_gives_the_same_record_back(tiny: Any, clock: None, tmp_path: Any) -> None:
    model = tiny("deepseek_v3")
    llmopt.optimize(model, [SMALL_GPTQ, Artificial(reason="not here")], measure="full")
    report = llmopt.report(model)
    text = report.to_json(tmp_path / "report.json")
    for source in (text, tmp_path / "report.json"):
        again = Report.from_json(source)
        assert again.to_json() == text
        assert [type(r) for r in again.passes] == [type(r) for r in report.passes]
        assert again.passes[0].timing == report.passes[0].timing
        assert again.passes[0].memory == report.passes[0].memory
    assert json.loads(text)["schema_version"] == 1
    assert "quantize_gptq" in str(again)
    assert "quantize_gptq" in again.to_markdown()


def test_unmeasured_runs_undo_nothing_and_time_nothing(tiny: Any) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, [SMALL_GPTQ, Artificial(after=lambda out: out * 3)], measure=False)
    report = llmopt.report(model)
    assert [r.verdict for r in report.passes] == ["kept", "kept"]
    assert all(r.timing is r.marginal is r.total is r.quality is None for r in report.passes)
    assert report.baseline is report.stock is report.ceilings is None
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


# ---- manners


def test_two_models_at_once_share_nothing(tiny: Any, unchanged: Any, token_rows: Any) -> None:
    models = {name: tiny(name) for name in ("qwen3", "ernie4_5", "deepseek_v2")}
    ids = token_rows(2, 16)
    checks = {name: unchanged(model) for name, model in models.items()}
    alone = {}
    for name, model in models.items():
        llmopt.optimize(model, [SMALL_GPTQ, Artificial()], measure=False)
        alone[name] = logits(model, ids)
        llmopt.restore(model)
    failed: list[BaseException] = []

    def work(model: Any) -> None:
        torch.set_num_threads(1)
        try:
            llmopt.optimize(model, [SMALL_GPTQ, Artificial()], measure=False)
        except BaseException as error:
            failed.append(error)
            raise

    workers = [threading.Thread(target=work, args=(m,)) for m in models.values()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed == []
    for name, model in models.items():
        assert torch.equal(logits(model, ids), alone[name]), name
    llmopt.restore(models["qwen3"])
    assert checks["qwen3"]()
    for name in ("ernie4_5", "deepseek_v2"):
        assert torch.equal(logits(models[name], ids), alone[name]), name


def test_nothing_global_is_changed(tiny: Any, clock: None) -> None:
    import signal

    torch.manual_seed(11)
    model = tiny("qwen3")
    state = torch.get_rng_state()
    root, signals = list(logging.getLogger().handlers), signal.getsignal(signal.SIGINT)
    own = list(logging.getLogger("llmopt").handlers)
    llmopt.optimize(model, [SMALL_GPTQ, Artificial()])
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger().handlers == root
    assert logging.getLogger("llmopt").handlers == own
    assert signal.getsignal(signal.SIGINT) is signals
    assert torch.is_grad_enabled()


# ---- what an optimized model can still do


class Streamer:
    """As transformers' own: prompt first, then every token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@functools.cache
def _kinds() -> dict[str, dict[str, Any]]:
    return {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        "beams": {"num_beams": 3},
        "sequences": {"do_sample": True, "num_return_sequences": 2},
    }


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_generate_works_in_every_way(family: str, tiny: Any, token_rows: Any) -> None:
    model, prompt = tiny(family), token_rows(2, 10)
    llmopt.optimize(model, None, measure=False)
    assert llmopt.report(model).kept()
    for kind, options in _kinds().items():
        torch.manual_seed(0)
        out = model.generate(prompt, max_new_tokens=6, pad_token_id=0, **options)
        assert out.shape == (2 * options.get("num_return_sequences", 1), 16), kind
        assert torch.equal(out[0, :10], prompt[0]), kind
        assert int(out.max()) < 512
    streamer = Streamer()
    out = model.generate(prompt[:1], max_new_tokens=6, do_sample=False, streamer=streamer, pad_token_id=0)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended
    assert torch.equal(out, model.generate(prompt[:1], max_new_tokens=6, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_left_padding_does_not_reach_the_output(family: str, tiny: Any, token_rows: Any) -> None:
    model, prompt = tiny(family), token_rows(3, 12)
    llmopt.optimize(model, None, measure=False)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    mask[2, :9] = 0
    padded = prompt * mask
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True,
                               "return_dict_in_generate": True}  # fmt: skip
    together = model.generate(padded, attention_mask=mask, **options)
    for row, start in ((1, 5), (2, 9)):
        alone = model.generate(prompt[row : row + 1, start:], **options)
        # the first step alone: random models turn a last bit into another token
        a, b = together.logits[0][row], alone.logits[0][0]
        assert float(nn.functional.cosine_similarity(a, b, dim=0)) > 0.99
    changed = model.generate(torch.where(mask.bool(), padded, 77), attention_mask=mask, **options)
    assert torch.equal(changed.sequences[:, 12:], together.sequences[:, 12:])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_optimized_model_stays_a_transformers_model(family: str, tiny: Any, token_rows: Any) -> None:
    model, ids = tiny(family), token_rows(2, 12)
    kind = type(model)
    llmopt.optimize(model, None, measure=False)
    assert type(model) is kind
    assert not any(m.training for m in model.modules())
    resolve_model(model)
    out = model(input_ids=ids, labels=ids, output_hidden_states=True, use_cache=True)
    assert out.loss.isfinite()
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits
    assert torch.equal(embedded, model(input_ids=ids, use_cache=False).logits)
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    logits(model, ids)
    handle.remove()
    assert seen == [1]


def test_all_registered_passes_run_by_default(tiny: Any, clock: None) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model)
    assert [r.name for r in llmopt.report(model).passes] == sorted(PASSES, key=lambda n: PASSES[n].phase)


class Looks(Artificial):
    """Notes which patches it finds on the model."""

    name = "looks"
    phase = Phase.RUNTIME

    def check(self, ctx: PassContext) -> Verdict:
        model: Any = ctx.model
        found = "forward" in vars(model.model.layers[self.layer])
        return Verdict(False, f"a reason, and the pass before it is {'on' if found else 'off'}")


@pytest.mark.parametrize("seed", range(4))
def test_a_pass_sees_the_model_as_the_kept_ones_have_made_it(seed: int, tiny: Any, clock: None) -> None:
    # the rounds before it end with any stage, this one's or the one before
    model = tiny("qwen3")
    llmopt.optimize(model, passes=[Second(), Looks()], seed=seed)
    first, looks = llmopt.report(model).passes
    assert first.verdict == "kept"
    assert looks.reason.endswith("is on")
