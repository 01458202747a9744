"""sample_token: filters at their edges, what cannot be drawn, shares of threads, bad calls; on a GPU's kernels too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops import device
from llmopt.ops.sample_token import reference, sample_token

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

NAN, INF = torch.nan, torch.inf
OFF = (1.0, 0.0, 1.0, 0.0)


@pytest.fixture(params=["cpp", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton":
        triton = pytest.importorskip("triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("TRITON_INTERPRET is not 1")
    with device.interpreting() if request.param == "triton" else nullcontext():
        yield request.param


def drawn(logits: torch.Tensor, settings: Any, noise: torch.Tensor | None = None) -> list[int]:
    logits = torch.atleast_2d(logits)
    noise = torch.ones_like(logits) if noise is None else noise
    ids, chosen = (torch.full((len(logits),), -7) for _ in range(2))
    given = torch.tensor(settings).expand(len(logits), 4).contiguous()
    sample_token(logits, torch.atleast_2d(noise), given, ids, chosen)
    assert torch.equal(ids, chosen.clamp(min=0))
    found: list[int] = chosen.tolist()
    return found


def kept(logits: torch.Tensor, settings: Any) -> list[int]:
    """Tokens that can be drawn: each has the only small noise once."""
    rows = logits.expand(len(logits), -1)
    noise = torch.ones_like(rows).fill_diagonal_(1e-15)
    return [i for i, token in enumerate(drawn(rows, settings, noise)) if token == i]


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (OFF, [0, 1, 2, 3, 4]),
        ((1.0, 2.0, 1.0, 0.0), [0, 1]),
        # equals of the last one stay
        ((1.0, 3.0, 1.0, 0.0), [0, 1, 2, 3, 4]),
        ((1.0, 5.0, 1.0, 0.0), [0, 1, 2, 3, 4]),
        ((1.0, 99.0, 1.0, 0.0), [0, 1, 2, 3, 4]),
        ((0.0, 0.0, 1.0, 0.0), [0]),
        ((-1.0, 0.0, 1.0, 0.0), [0]),
        # shares: .4, .3, .1, .1, .1
        ((1.0, 0.0, 0.39, 0.0), [0]),
        ((1.0, 0.0, 0.41, 0.0), [0, 1]),
        ((1.0, 0.0, 0.69, 0.0), [0, 1]),
        ((1.0, 0.0, 0.71, 0.0), [0, 1, 2, 3, 4]),
        ((1.0, 0.0, 0.0, 0.0), [0]),
        # of the two largest: .57, .43
        ((1.0, 2.0, 0.56, 0.0), [0]),
        ((1.0, 2.0, 0.58, 0.0), [0, 1]),
        ((1.0, 0.0, 1.0, 0.74), [0, 1]),
        ((1.0, 0.0, 1.0, 0.76), [0]),
        ((1.0, 0.0, 1.0, 1.0), [0]),
        ((1.0, 0.0, 1.0, 7.0), [0]),
        # at twice the temperature .75 counts as .87
        ((2.0, 0.0, 1.0, 0.86), [0, 1]),
        ((NAN, NAN, NAN, NAN), [0]),
    ],
    ids=str,
)
def test_a_filter_keeps_what_it_keeps(settings: Any, want: list[int], kernels: str) -> None:
    logits = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]).log()
    assert kept(logits, settings) == want
    assert sorted(4 - i for i in kept(logits.flip(0), settings)) == want


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([1.0, NAN, 2.0], -1),
        ([NAN, NAN], -1),
        ([1.0, INF, 2.0], -1),
        ([-INF, -INF], -1),
        ([-INF, -1e38], 1),
        ([-INF, 3e38, -3e38], 1),
        ([0.0], 0),
        ([-0.0, 0.0], 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [OFF, (0.7, 2.0, 0.9, 0.0), (0.7, 0.0, 0.9, 0.1), (0.0, 0.0, 1.0, 0.0)], ids=str)
@pytest.mark.parametrize("before", [0, 3, 300])
def test_what_cannot_be_drawn_is_said(row: list[float], want: int, settings: Any, before: int, kernels: str) -> None:
    filler = torch.full((before,), -INF)
    assert drawn(torch.cat([torch.tensor(row), filler]), settings) == [want]
    assert drawn(torch.cat([filler, torch.tensor(row)]), settings) == [want + before if want >= 0 else -1]


def test_no_noise_draws_what_was_filtered(kernels: str) -> None:
    logits = torch.tensor([5.0, 4.0, -50.0, -INF, -90.0])
    for settings in (OFF, (1.0, 2.0, 1.0, 0.0)):
        noise = torch.tensor([1.0, 0.2, 1e-30, 0.0, 0.0])
        assert drawn(logits, settings, noise) == [1]


@pytest.mark.parametrize("name", ["flat", "steep", "two_levels"])
def test_many_or_few_may_pass(name: str, kernels: str) -> None:
    g = torch.Generator().manual_seed(1)
    logits = {
        "flat": torch.randn(2, 9000, generator=g) * 0.01,
        "steep": torch.randn(2, 9000, generator=g) * 40,
        "two_levels": (torch.rand(2, 9000, generator=g) < 0.1).float() * 3,
    }[name]
    noise = torch.empty_like(logits).exponential_(generator=g)
    for settings in ((1.0, 0.0, 0.5, 0.0), (1.0, 200.0, 1.0, 0.0), (0.5, 3000.0, 0.9, 0.0), (1.0, 0.0, 1.0, 0.2),
                     (2.0, 0.0, 0.999, 0.0001)):  # fmt: skip
        expected = reference.sample_token(logits, noise, torch.tensor([settings] * 2))
        assert drawn(logits, settings, noise) == expected.tolist(), settings


def test_each_token_is_drawn_as_often_as_its_weight_says(isa: str) -> None:
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1])
    torch.manual_seed(0)
    noise = torch.empty(20_000, 4).exponential_()
    tokens = torch.tensor(drawn(weights.log().expand(20_000, 4), OFF, noise))
    torch.testing.assert_close(tokens.bincount() / 20_000, weights, rtol=0, atol=0.015)


def test_any_number_of_threads_draws_the_same(threads: Callable[[int], None], isa: str) -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 200_003, generator=g) * 3
    noise = torch.empty_like(logits).exponential_(generator=g)
    for settings in (OFF, (0.8, 40.0, 0.9, 0.0), (0.8, 0.0, 0.95, 0.01), (1.0, 5000.0, 0.9, 0.0)):
        found = []
        for count in (1, 2, 3, 7):
            threads(count)
            found.append(drawn(logits, settings, noise))
        assert found.count(found[0]) == 4
        assert found[0] == reference.sample_token(logits, noise, torch.tensor([settings] * 5)).tolist()


def test_nothing_is_written_around_the_tokens(kernels: str) -> None:
    buffer, other = torch.full((7,), -5), torch.full((7,), -5)
    sample_token(torch.eye(3) * 9, torch.ones(3, 3), torch.tensor([OFF] * 3), buffer[2:5], other[1:4])
    assert buffer.tolist() == [-5, -5, 0, 1, 2, -5, -5]
    assert other.tolist() == [-5, 0, 1, 2, -5, -5, -5]
    sample_token(torch.eye(3) * 9, torch.ones(3, 3), torch.tensor([OFF] * 3), buffer[:3])
    assert buffer.tolist() == [0, 1, 2, 1, 2, -5, -5]


def arguments(**changes: Any) -> dict[str, Any]:
    ids, chosen = torch.full((2,), -7), torch.full((2,), -7)
    given = {
        "logits": torch.ones(2, 5),
        "noise": torch.ones(2, 5),
        "settings": torch.ones(2, 4),
        "ids": ids,
        "chosen": chosen,
    }
    return {**given, **changes}


BAD = {
    "logits_1d": ("logits", torch.ones(5)),
    "logits_half": ("logits", torch.ones(2, 5).half()),
    "logits_rows": ("logits", torch.ones(3, 5)),
    "logits_empty": ("logits", torch.ones(2, 0)),
    "logits_strided": ("logits", torch.ones(2, 10)[:, ::2]),
    "noise_short": ("noise", torch.ones(2, 4)),
    "noise_double": ("noise", torch.ones(2, 5).double()),
    "settings_three": ("settings", torch.ones(2, 3)),
    "settings_rows": ("settings", torch.ones(1, 4)),
    "ids_int32": ("ids", torch.zeros(2, dtype=torch.int32)),
    "chosen_int32": ("chosen", torch.zeros(2, dtype=torch.int32)),
    "chosen_rows": ("chosen", torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str, kernels: str) -> None:
    argument, value = BAD[name]
    given = arguments(**{argument: value})
    # a wrong number of rows is seen at the argument that disagrees with the one checked first
    named = {"logits_rows": "(logits|noise)", "logits_empty": "(logits|noise)"}.get(name, argument)
    with pytest.raises(InputError, match=f"^sample_token: {named}"):
        sample_token(**given)
    assert all((given[n] == -7).all() for n in ("ids", "chosen") if n != argument)
