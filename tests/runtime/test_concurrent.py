"""Callers in several threads, of one fused model and of several: each gets what it gets alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from llmopt.models import resolve_model
from llmopt.runtime import latent
from llmopt.runtime.engine import Engine
from llmopt.runtime.step import DecodeStep

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _often_switched() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """Runs each in a thread of its own, all from the same moment; results, or the errors raised."""
    found: list[Any] = [None] * len(work)
    begin = threading.Barrier(len(work))

    def call(i: int) -> None:
        begin.wait()
        try:
            found[i] = work[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a caller hangs"
    return found


def agree(got: list[Any], expected: list[torch.Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, torch.Tensor), a
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "ernie4_5_moe"])
def test_generate_lookup_and_forward_mixed(
    family: str, count: int, fused: Any, token_rows: Any, threads: Callable[[int], None]
) -> None:
    threads(count)
    repeating = torch.arange(5, 15).repeat(3)[None]

    def calls(model: Any) -> list[Callable[[], torch.Tensor]]:
        def forward(rows: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = model(rows).logits
            return logits

        return [
            lambda: model.generate(token_rows(1, 12, seed=1), **GREEDY),
            lambda: model.generate(token_rows(1, 12, seed=2), **GREEDY),
            lambda: model.generate(token_rows(3, 9, seed=3), **GREEDY),
            lambda: model.generate(repeating, prompt_lookup_num_tokens=4, **GREEDY),
            lambda: forward(token_rows(2, 40, seed=4)),
            lambda: forward(token_rows(1, 5, seed=5)),
        ]

    expected = [call() for call in calls(fused(family)[1])]
    model = fused(family)[1]  # nothing is prepared yet: all begin at once
    for _ in range(3):
        agree(in_threads(*calls(model)), expected)


def test_several_models(fused: Any, token_rows: Any) -> None:
    models = [fused(family)[1] for family in ("qwen3", "deepseek_v3", "qwen3")]
    prompts = [token_rows(1, 12, seed=s) for s in range(3)]
    calls = [lambda m=m, p=p: m.generate(p, **GREEDY) for m, p in zip(models, prompts, strict=True)]
    expected = [call() for call in calls]
    for _ in range(3):
        agree(in_threads(*calls), expected)


class Breaks(BaseStreamer):  # type: ignore[misc]
    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyError("in the middle")

    def end(self) -> None:
        return None


def test_an_error_in_one_leaves_the_others_alone(fused: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = fused("qwen3")
    prompts = [token_rows(1, 12, seed=s) for s in range(2)]
    good = [lambda p=p: model.generate(p, **GREEDY) for p in prompts]
    expected = [call() for call in good]
    make_calls = DecodeStep.make_calls

    def breaks(self: DecodeStep) -> object:
        made = make_calls(self)
        if len(self.ids) == 5:
            raise KeyError("while recording")
        return made

    monkeypatch.setattr(DecodeStep, "make_calls", breaks)
    for _ in range(3):
        got = in_threads(
            *good,
            lambda: model.generate(torch.tensor([[1, 10**6]]), **GREEDY),
            lambda: model.generate(prompts[0], streamer=Breaks(4), **GREEDY),
            lambda: model.generate(token_rows(5, 6), **GREEDY),
        )
        agree(got[:2], expected)
        assert [type(error) for error in got[2:]] == [IndexError, KeyError, KeyError], got[2:]
    agree([call() for call in good], expected)


# ---- what callers share


def test_a_kept_cache_goes_to_one_caller(fused: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = fused("qwen3")
    model.generate(token_rows(1, 12), **GREEDY)
    generation = model.generate.__self__
    assert len(generation._idle) == 1
    taken, fits = [], DecodeStep.fits

    def meanwhile(self: DecodeStep, cache: Any, engine: Any) -> bool:
        # another caller comes while this one is looking
        monkeypatch.setattr(DecodeStep, "fits", fits)
        taken.append(generation._take_cache(1, 8))
        return fits(self, cache, engine)

    monkeypatch.setattr(DecodeStep, "fits", meanwhile)
    taken.append(generation._take_cache(1, 8))
    assert taken[0] is not taken[1]
    assert taken[0].keys[0].data_ptr() != taken[1].keys[0].data_ptr()


def test_rope_tables_are_as_long_as_each_caller_asked(tiny: Any) -> None:
    class Interrupted(Engine):
        """Another thread puts its shorter table in place of a long one."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_rope" and value is not None and len(value.cos) >= 5000:
                super().__setattr__(name, shorter)

    engine = Interrupted(resolve_model(tiny("qwen3")))
    shorter = engine.rope(10)
    assert len(shorter.cos) < 5000
    assert len(engine.rope(5000).cos) >= 5000
    assert len(engine.rope(10).cos) >= 10


def test_absorbed_weights_made_twice_are_used_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = Engine(resolve_model(tiny("deepseek_v3"))).layers[0][0]
    make, both = latent.absorbed_weights, threading.Barrier(2)

    def together(*args: Any, **named: Any) -> Any:
        made = make(*args, **named)
        both.wait(60)
        return made

    monkeypatch.setattr(latent, "absorbed_weights", together)
    first, second = in_threads(block.halves, block.halves)
    assert first[0] is second[0] is block.halves()[0]
    assert first[1] is second[1]
