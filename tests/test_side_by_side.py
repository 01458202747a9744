"""compare: several models as they are, in the same rounds, held against the first, and none of them changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native, side_by_side
from llmopt.errors import InputError, ModelStateError, UnsupportedModelError
from llmopt.measure import ceilings, environment, timing, traffic
from llmopt.measure.comparison import Comparison
from llmopt.measure.memory import module_bytes
from llmopt.measure.report import Ceilings, Interval
from llmopt.models import resolve_model
from llmopt.models.shapes import build
from llmopt.passes import QuantizeGptq
from llmopt.passes.base import Event
from llmopt.passes.quantize_gptq import calibrate

ASSETS = Path(__file__).parent.parent / "assets"
PLAN = timing.Plan(prompt_tokens=8, decode_tokens=3, min_rounds=3, max_rounds=3)
PASSES = [QuantizeGptq(group_size=64), "swap_flash_attention"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "usable_meter", lambda: None)
    monkeypatch.setattr(side_by_side, "_QUALITY_ROWS", 6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, torch.Tensor]]:
    """A model takes the milliseconds that its attribute ``test_ms`` (TTFT, TPOT) says; gives the calls."""
    calls: list[tuple[Any, torch.Tensor]] = []

    def run_once(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        calls.append((model, prompt))
        ttft, tpot = getattr(model, "test_ms", (8.0, 2.0))
        return ttft, tpot

    monkeypatch.setattr(timing, "run_once", run_once)
    return calls


def measure(models: dict[str, Any], **settings: Any) -> Comparison:
    return side_by_side.measure(models, **{"plan": PLAN, **settings})


def as_trained(model: Any) -> Any:
    """Random weights treated as trained ones."""
    del model.llmopt_random_weights
    return model


@pytest.fixture
def state_of(snapshot: Any) -> Callable[[Any], Any]:
    """Everything a comparison must leave as it was: modules, bits, settings, hooks, and what llmopt keeps."""

    def state(model: Any) -> Any:
        modules = {name: id(module) for name, module in model.named_modules()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        settings = [{k: repr(v) for k, v in vars(c).items()} for c in (model.config, model.generation_config)]
        kept = sorted(key for key in vars(model) if key not in ("_modules", "_parameters", "_buffers"))
        bits = {name: tensor.numpy(force=True).tobytes() for name, tensor in snapshot(model).items()}
        return modules, hooks, settings, kept, bits

    return state


def test_plain_optimized_and_loaded_models_as_they_are(
    tiny: Any, tmp_path: Path, token_rows: Any, state_of: Any
) -> None:
    plain, optimized = tiny("ernie4_5_moe"), tiny("ernie4_5_moe")
    llmopt.optimize(optimized, PASSES, calibration=token_rows(4, 64), measure=False)
    loaded = llmopt.load(llmopt.save(optimized, tmp_path / "out"))
    models = {"plain": plain, "optimized": optimized, "loaded": loaded}
    before = {name: state_of(model) for name, model in models.items()}
    found = measure(models, seed=3)
    assert {name: state_of(model) for name, model in models.items()} == before
    assert torch.is_grad_enabled()
    assert [row.name for row in found.rows] == list(models)
    first, *others = found.rows
    assert first.gain is first.request is None
    for row in found.rows:
        assert row.timing.decode_ms.rounds == 3
        assert row.timing.prefill_ms.value > 0
        assert row.memory.weights == module_bytes(models[row.name])
        assert row.decode_bytes_per_token == traffic.decode_bytes(resolve_model(models[row.name]), 8, 3)
        assert (row.model["model_type"], row.model["layers"], row.model["vocab_size"]) == ("ernie4_5_moe", 3, 512)
    for row in others:
        assert row.memory.weights < 0.6 * first.memory.weights
        assert row.decode_bytes_per_token < first.decode_bytes_per_token
        assert row.gain is not None
        assert row.request is not None
        assert row.model["weights"].startswith("int4 g64, ")
        assert row.model["attention"] == "llmopt_attention"
    assert first.model["weights"] == "float32"
    assert [row.model["passes"] for row in found.rows] == [[], *[["quantize_gptq", "swap_flash_attention"]] * 2]
    assert [row.model["experts"] is None for row in found.rows] == [False, True, True]
    assert found.settings["seed"] == 3
    assert found.settings["rounds"] == 3
    assert found.environment["versions"]["torch"] == torch.__version__
    llmopt.restore(optimized)


def test_ratios_are_of_the_same_rounds_against_the_first(tiny: Any, clock: Any) -> None:
    models = {"a": tiny("qwen3"), "b": tiny("qwen3"), "c": tiny("llama")}
    for model, ms in zip(models.values(), ((100.0, 8.0), (50.0, 2.0), (200.0, 8.0)), strict=True):
        model.test_ms = ms
    found = measure(models)
    _, b, c = found.rows
    assert b.gain is not None
    assert c.gain is not None
    assert b.gain.prefill == Interval(2.0, 2.0, 2.0, 3)
    assert b.gain.decode == Interval(4.0, 4.0, 4.0, 3)
    assert c.gain.prefill.value == 0.5
    assert c.gain.decode.value == 1.0
    assert b.request is not None
    assert b.request.value == pytest.approx((100 + 128 * 8) / (50 + 128 * 2))
    assert b.timing.decode_tok_per_s == 500
    order = [next(name for name, model in models.items() if model is called) for called, _ in clock]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(torch.equal(prompt, clock[0][1]) for _, prompt in clock)


def test_ceilings_are_of_the_same_rounds(tiny: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter(ceilings.CeilingMeter):
        rounds = 0
        closed = False

        def measure_round(self) -> Any:
            Meter.rounds += 1

        def result(self) -> Ceilings:
            return Ceilings(read_gb_per_s=Interval(20.0, 19.0, 21.0, Meter.rounds))

        def close(self) -> None:
            Meter.closed = True

    monkeypatch.setattr(ceilings, "usable_meter", Meter)
    found = measure({"a": tiny("qwen3")})
    (row,) = found.rows
    assert Meter.rounds == 3
    assert Meter.closed
    assert found.ceilings is not None
    assert found.ceilings.read_gb_per_s is not None
    assert row.bandwidth_fraction == pytest.approx(row.decode_bytes_per_token / 2e-3 / 20e9)
    Meter.closed = False
    with pytest.raises(ZeroDivisionError):
        measure({"a": tiny("qwen3")}, on_event=lambda event: 1 // 0)
    assert Meter.closed


def test_without_the_kernels_the_record_says_so(tiny: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available() == (measure({"a": tiny("qwen3")}).notes == [])
    monkeypatch.setattr(environment, "kernels", lambda: {"path": None, "isa": None, "reason": "not built"})
    assert measure({"a": tiny("qwen3")}).notes == ["running on PyTorch alone: not built"]


# ---- quality


def test_quality_against_the_first_on_held_out_text(trained: Any, token_rows: Any, clock: Any) -> None:
    plain, quantized = trained("qwen3"), trained("qwen3")
    llmopt.optimize(quantized, [QuantizeGptq()], calibration=token_rows(4, 64), measure=False)
    first, same, int4 = measure({"a": plain, "b": copy.deepcopy(plain), "int4": quantized}).rows
    for row in (first, same):
        assert row.quality is not None
        assert (row.quality.mean_kl, row.quality.top1_agreement) == (0, 1)
        assert row.quality.perplexity_ratio == pytest.approx(1, abs=1e-6)
        assert row.quality.first_divergent_layer is None
    assert int4.quality is not None
    assert 1e-4 < int4.quality.mean_kl < 0.2
    assert int4.quality.first_divergent_layer == "model.layers.0"
    assert first.notes == same.notes == int4.notes == []
    assert int4.quality.tokens == 6 * calibrate.ROW_TOKENS


def test_other_layers_are_compared_on_logits_alone(trained: Any, clock: Any) -> None:
    found = measure({"a": trained("qwen3"), "b": trained("ernie4_5_moe")})
    other = found.rows[1]
    assert other.quality is not None
    assert other.quality.mean_kl > 0.01
    assert other.quality.first_divergent_layer is None
    assert other.quality.non_finite == []
    assert other.notes == ["not compared layer by layer: 3 layers of 256, a has 4 of 256"]
    assert found.settings["prompt"] == "held-out text"


def other_vocabulary(model_type: str, vocab: int) -> Any:
    from transformers import AutoConfig

    from llmopt.models import family_for

    config = AutoConfig.for_model(model_type, **{**family_for(model_type).tiny_config, "vocab_size": vocab})
    return build(config, dtype=torch.float32)


def test_why_there_is_no_quality(tiny: Any, trained: Any, clock: Any) -> None:
    models = {"a": trained("qwen3"), "random": tiny("qwen3"), "smaller": as_trained(tiny("llama"))}
    first, random, smaller = measure(models).rows
    assert first.quality is not None
    assert random.quality is smaller.quality is None
    assert random.notes == ["quality was not measured: random weights (random)"]
    assert smaller.notes == ["quality was not measured: a vocabulary of 512, that of a has 4096"]
    rows = measure({"random": tiny("qwen3"), "b": as_trained(tiny("qwen3"))}).rows
    assert [row.notes for row in rows] == [["quality was not measured: random weights (random)"]] * 2
    rows = measure({"c": as_trained(tiny("qwen3")), "d": as_trained(tiny("qwen3"))}).rows
    assert [row.notes for row in rows] == [
        ["quality was not measured: there is no tokenizer.json beside the weights, and none was given"]
    ] * 2


def test_other_tokenizers_are_noticed(trained: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = trained("qwen3"), trained("qwen3"), as_trained(other_vocabulary("qwen3", 4096))
    find = calibrate.find_tokenizer

    def reversed_text(model: Any) -> Any:
        tokenizer = find(model)
        return tokenizer if model is not second else lambda text, **options: tokenizer(text[::-1], **options)

    monkeypatch.setattr(calibrate, "find_tokenizer", reversed_text)
    found = measure({"a": first, "b": second, "c": third})
    assert found.rows[1].notes == ["quality was not measured: its tokenizer reads text differently"]
    # no tokenizer of its own, and the vocabulary of one that has
    assert found.rows[2].quality is not None
    assert found.settings["prompt"] == "random token ids"
    with pytest.raises(InputError, match=r"^prompt: expected token ids: the models' tokenizers do not read"):
        measure({"a": first, "b": second}, prompt="some text")


def test_a_tokenizer_that_knows_more_than_the_model(trained: Any, clock: Any) -> None:
    small = as_trained(other_vocabulary("qwen3", 600))
    small.config._name_or_path = str(ASSETS / "tiny-qwen3")
    found = measure({"small": small})
    assert found.rows[0].notes == [
        "quality was not measured: the tokenizer knows more tokens than the vocabulary of 600"
    ]
    assert found.settings["prompt"] == "random token ids"


# ---- the prompt


def test_models_of_different_vocabularies_read_ids_that_all_know(tiny: Any, clock: Any) -> None:
    models = {"a": tiny("qwen3"), "b": other_vocabulary("llama", 60)}
    found = measure(models)
    prompt = clock[0][1]
    assert prompt.shape == (1, 8)
    assert int(prompt.max()) < 60
    assert found.settings["prompt"] == "random token ids"
    measure(models, seed=1)
    assert not torch.equal(clock[-1][1], prompt)
    measure(models, seed=0)
    assert torch.equal(clock[-1][1], prompt)


def test_models_that_share_a_tokenizer_read_text(trained: Any, clock: Any) -> None:
    measure({"a": trained("qwen3"), "b": trained("deepseek_v3")})
    text = calibrate.find_tokenizer(trained("qwen3"))(calibrate.packaged_text("quality"), add_special_tokens=False)
    assert clock[0][1][0].tolist() == text["input_ids"][:8]


@pytest.mark.parametrize(
    "prompt", [[5, 6, 7], (5, 6, 7), torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]], dtype=torch.int32)],
    ids=["list", "tuple", "row", "batch"],
)  # fmt: skip
def test_a_prompt_of_token_ids(prompt: Any, tiny: Any, clock: Any) -> None:
    found = measure({"a": tiny("qwen3")}, prompt=prompt)
    assert clock[0][1].dtype == torch.int64
    assert clock[0][1].tolist() == [[5, 6, 7]]
    assert found.settings["prompt"] == "as given"
    assert found.settings["prompt_tokens"] == found.rows[0].timing.prompt_tokens == 3


def test_a_prompt_of_text(trained: Any, tiny: Any, clock: Any) -> None:
    text = "The river was wide."
    expected = calibrate.find_tokenizer(trained("qwen3"))(text, add_special_tokens=False)["input_ids"]
    measure({"a": trained("qwen3"), "b": trained("ernie4_5_moe")}, prompt=text)
    assert clock[0][1][0].tolist() == expected
    with pytest.raises(InputError, match=r"^prompt: expected token ids, or tokenizer=: there is no tokenizer"):
        measure({"a": tiny("qwen3")}, prompt=text)


def test_a_tokenizer_given_is_that_of_all_models(trained: Any, clock: Any) -> None:
    tokenizer = calibrate.find_tokenizer(trained("qwen3"))
    models = {name: as_trained(other_vocabulary("qwen3", 4096)) for name in ("a", "b")}
    found = measure(models, prompt="The river was wide.", tokenizer=tokenizer)
    assert clock[0][1][0].tolist() == tokenizer("The river was wide.", add_special_tokens=False)["input_ids"]
    assert all(row.quality is not None for row in found.rows)
    with pytest.raises(InputError, match=r"^tokenizer: expected a transformers tokenizer or None, got 'qwen3'"):
        measure(models, tokenizer="qwen3")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 512], r"token ids in \[0, 512\), which all models know, got 1 to 512"),
        ([-1, 2], r"token ids in \[0, 512\)"),
        ([], "expected text or token ids"),
        ([0.5], "expected text or token ids"),
        ([[1, 2], [3, 4]], r"token ids \[T\] or \[1, T\]"),
        ([["a"]], r"token ids \[T\] or \[1, T\], got list"),
        ({"input_ids": [1]}, "got dict"),
    ],
    ids=["too_large", "negative", "empty", "floats", "two_rows", "nested_text", "mapping"],
)
def test_a_bad_prompt(prompt: Any, message: str, tiny: Any, clock: Any) -> None:
    with pytest.raises(InputError, match=rf"^prompt: .*{message}"):
        measure({"a": tiny("qwen3")}, prompt=prompt)
    assert clock == []


# ---- errors and manners


def training(model: Any) -> Any:
    return model.train()


def on_meta(model: Any) -> Any:
    return model.to("meta")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (training, ModelStateError, "expected eval mode, got training mode"),
        (on_meta, ModelStateError, "expected weights in memory"),
        (lambda model: model.model, UnsupportedModelError, "language-model head"),
        (lambda model: "Qwen/Qwen3-0.6B", UnsupportedModelError, "PreTrainedModel"),
    ],
    ids=["training", "meta", "no_head", "a_name"],
)
def test_a_model_that_cannot_be_run_is_named(
    spoil: Any, error: type[Exception], message: str, tiny: Any, clock: Any
) -> None:
    models = {"good": tiny("qwen3"), "bad": spoil(tiny("qwen3"))}
    with pytest.raises(error, match=rf"^models\['bad'\]: .*{message}"):
        measure(models)
    assert clock == []


def test_the_same_object_twice_and_other_bad_mappings(tiny: Any, clock: Any) -> None:
    model = tiny("qwen3")
    with pytest.raises(InputError, match=r"^models: .* one under 'a' and 'b'"):
        llmopt.compare({"a": model, "b": model})
    for bad in ({}, [model], None, {1: model}):
        with pytest.raises(InputError, match=r"^models: expected"):
            llmopt.compare(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^on_event: "):
        llmopt.compare({"a": model}, on_event="loud")  # type: ignore[arg-type]
    assert clock == []


def test_models_on_different_devices(tiny: Any, monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    monkeypatch.setattr(side_by_side, "check_runnable", lambda model: model)
    with pytest.raises(InputError, match=r"^models: expected all on one device, got cpu \(a\), meta \(b\)"):
        measure({"a": tiny("qwen3"), "b": tiny("qwen3").to("meta")})


def test_events_say_how_far_it_is(trained: Any, clock: Any) -> None:
    events: list[Event] = []
    measure({"a": trained("qwen3")}, on_event=events.append)
    assert [(e.kind, e.name, e.message) for e in events[:1]] == [("stage", "compare", "quality of a")]
    assert [(e.kind, e.done, e.total) for e in events[1:]] == [("progress", i, 3) for i in (1, 2, 3)]


def test_compare_is_public_and_its_record_can_be_read_back(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "Plan", lambda **_: PLAN)
    found = llmopt.compare({"a": tiny("qwen3"), "b": tiny("deepseek_v2", torch.bfloat16)}, seed=2)
    assert isinstance(found, llmopt.Comparison)
    text = found.to_json(tmp_path / "c.json")
    assert llmopt.Comparison.from_json(tmp_path / "c.json") == llmopt.Comparison.from_json(text) == found
    assert json.loads(text)["schema_version"] == 1
    for view in (str(found), found.to_markdown()):
        assert "deepseek_v2" in view
        assert "random weights (b, a)" in view
