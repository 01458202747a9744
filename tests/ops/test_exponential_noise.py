"""exponential_noise beside torch's exponential_: the same values, and the generator in the same place."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops import exponential_noise as op
from llmopt.ops.exponential_noise import exponential_noise, reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


def pair(seed: int = 1) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


def agree(ours: torch.Generator, torchs: torch.Generator, *shape: int) -> None:
    got, expected = torch.full(shape, torch.nan), torch.empty(shape)
    exponential_noise(got, ours)
    reference.exponential_noise(expected, torchs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert torch.equal(ours.get_state(), torchs.get_state())


def test_this_torch_draws_as_we_do() -> None:
    # where it does not, everything below would be torch beside torch
    assert op._as_torch()


def test_values_follow_each_other_as_torchs_do(isa: str) -> None:
    ours, torchs = pair()
    for size in (1, 2, 311, 312, 313, 623, 624, 625, 0, 7, 9984, 10_000, 20_001, 70_000):
        agree(ours, torchs, size)
    agree(ours, torchs, 3, 5000)


def test_other_draws_in_between_are_torchs(isa: str) -> None:
    ours, torchs = pair(2)
    for count in (1, 2, 5, 622):
        # words of the state, one by one: values then begin in the middle of a pair, and pairs lie across two states
        for generator in (ours, torchs):
            for _ in range(count):
                torch.randint(2, (1,), generator=generator)
        agree(ours, torchs, 1000)
        assert torch.equal(torch.rand(9, generator=ours), torch.rand(9, generator=torchs))


def test_many_values_are_as_precise_and_none_is_negative(isa: str) -> None:
    ours, torchs = pair(3)
    agree(ours, torchs, 3_000_000)
    values = torch.empty(1_000_000)
    exponential_noise(values, ours)
    assert (values > 0).all()
    assert abs(float(values.mean()) - 1) < 0.01


def test_any_number_of_threads_draws_the_same(threads: Callable[[int], None], isa: str) -> None:
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        values = torch.empty(100_000)
        exponential_noise(values, torch.Generator().manual_seed(4))
        found.append(values)
    assert all(torch.equal(values, found[0]) for values in found)


def test_callers_in_several_threads_draw_different_values() -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.empty(50, 700) for _ in range(4)]

    def work(rows: torch.Tensor) -> None:
        torch.set_num_threads(1)
        for row in rows:
            exponential_noise(row, generator)

    workers = [threading.Thread(target=work, args=(rows,)) for rows in drawn]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    expected = torch.empty(200, 700)
    exponential_noise(expected, torch.Generator().manual_seed(5))
    # each row is one of those that follow each other, and each is there once
    assert sorted(torch.cat(drawn)[:, 0].tolist()) == sorted(expected[:, 0].tolist())


def test_another_torch_draws_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_draw", lambda out, generator: out.fill_(1.0))
    op._as_torch.cache_clear()
    try:
        assert not op._as_torch()
        ours, torchs = pair(6)
        agree(ours, torchs, 1000)
    finally:
        op._as_torch.cache_clear()


@pytest.mark.parametrize(
    "out",
    [torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4).T[:2], torch.zeros(8)[::2]],
    ids=["float64", "transposed", "strided"],
)
def test_a_bad_output_is_named_and_nothing_drawn(out: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    with pytest.raises(InputError, match=r"^exponential_noise: out: expected float32, contiguous"):
        exponential_noise(out, generator)
    assert torch.equal(generator.get_state(), before)


def test_a_state_that_is_none_is_refused() -> None:
    out = torch.empty(4)
    for state in (torch.zeros(10, dtype=torch.uint8), torch.full((5056,), 255, dtype=torch.uint8), torch.zeros(5056)):
        with pytest.raises(ValueError, match=r"^state: "):
            native.library().exponential_noise(state, out)
