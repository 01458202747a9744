"""Sampling by one op: which processors it stands in for, and that it draws what they and torch draw."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.generation import LogitsProcessorList
from transformers.generation import logits_process as hf

from llmopt import native
from llmopt.runtime.sampling import Sampling, Settings, drawn, split

VOCAB = 3001


def test_the_last_processors_become_settings() -> None:
    penalty, temperature = hf.RepetitionPenaltyLogitsProcessor(1.1), hf.TemperatureLogitsWarper(0.6)
    top_k, top_p, min_p = hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.1)
    usual = Settings(0.6, 20, 0.9, 0.0)
    cases: list[tuple[list[Any], list[Any], Settings]] = [
        ([], [], Settings()),
        ([temperature], [], Settings(0.6)),
        ([temperature, top_k, top_p], [], usual),
        ([temperature, top_k, top_p, min_p, hf.LogitNormalization()], [], Settings(0.6, 20, 0.9, 0.1)),
        ([penalty, temperature, top_k, top_p], [penalty], usual),
        ([temperature, top_k, penalty], [temperature, top_k, penalty], Settings()),
        # another order than transformers': the filters do not commute
        ([top_p, top_k], [top_p], Settings(top_k=20)),
        ([temperature, top_k, top_k], [temperature, top_k], Settings(top_k=20)),
        # what is filtered may still be drawn, or more than one has to stay
        *(([temperature, odd], [temperature, odd], Settings()) for odd in (
            hf.TopKLogitsWarper(20, filter_value=-9.0), hf.TopPLogitsWarper(0.9, min_tokens_to_keep=2),
        )),
    ]  # fmt: skip
    for given, first, settings in cases:
        assert split(LogitsProcessorList(given)) == (first, settings)


def test_a_processor_derived_from_a_known_one_runs_itself() -> None:
    class Own(hf.TopKLogitsWarper):
        pass

    given = [hf.TemperatureLogitsWarper(0.5), Own(20)]
    assert split(LogitsProcessorList(given)) == (given, Settings())


@pytest.mark.skipif(not native.available(), reason="no compiled kernels")
@pytest.mark.parametrize("seed", range(40))
def test_tokens_are_those_of_transformers_processors_and_multinomial(seed: int, isa: str) -> None:
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(4, VOCAB, generator=generator) * pick.choice([0.5, 2.0, 6.0])
    logits[0, torch.randint(VOCAB, (200,), generator=generator)] = -torch.inf
    warpers: list[Any] = [
        *([hf.TemperatureLogitsWarper(pick.uniform(0.2, 2.0))] if pick.random() < 0.7 else []),
        *([hf.TopKLogitsWarper(pick.choice([1, 5, 20, 64, 300]))] if pick.random() < 0.6 else []),
        *([hf.TopPLogitsWarper(pick.uniform(0.1, 0.99))] if pick.random() < 0.6 else []),
        *([hf.MinPLogitsWarper(pick.uniform(0.001, 0.3))] if pick.random() < 0.4 else []),
    ]
    first, settings = split(LogitsProcessorList(warpers))
    assert first == []
    sampling = Sampling(4, VOCAB, logits.device)
    sampling.use(settings)
    for again in range(5):
        torch.manual_seed(again)
        scores = LogitsProcessorList(warpers)(torch.zeros(4, 1, dtype=torch.int64), logits)
        expected = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        stands = torch.get_rng_state()
        torch.manual_seed(again)
        ids = torch.empty(4, dtype=torch.int64)
        sampling.renew()
        sampling.choose(logits, ids)
        assert torch.equal(ids, expected)
        assert torch.equal(sampling.chosen, expected)
        assert torch.equal(torch.get_rng_state(), stands)


def test_where_nothing_can_be_drawn_it_is_torchs_error() -> None:
    with pytest.raises(RuntimeError) as ours:
        drawn(torch.tensor([4, -1]))
    with pytest.raises(RuntimeError) as torchs:
        torch.multinomial(torch.full((1, 3), torch.nan), 1)
    assert str(ours.value) == str(torchs.value)
    assert drawn(torch.tensor([4, 0])).tolist() == [4, 0]
