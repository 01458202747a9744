"""next_token and advance: ties, NaN, Inf, shares of threads, bad calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.next_token import advance, next_token

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

NAN, INF = torch.nan, torch.inf


def chosen(logits: torch.Tensor) -> list[int]:
    ids = torch.full((logits.shape[0],), -7)
    next_token(logits, ids)
    found: list[int] = ids.tolist()
    return found


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([1.0, 3.0, 3.0, 2.0], 1),
        ([NAN, 1.0, 2.0], 0),
        ([2.0, NAN, 1.0], 1),
        ([2.0, NAN, INF, -NAN], 1),
        ([NAN, NAN], 0),
        ([-INF, -INF], 0),
        ([-INF, -1e38], 1),
        ([INF, INF, NAN], 2),
        ([1.0, INF, 2.0], 1),
        ([-0.0, 0.0], 0),
        ([1e-45, 0.0], 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [0, 3, 16, 512, 515])
def test_the_first_largest_is_chosen(row: list[float], want: int, before: int, isa: str) -> None:
    filler = torch.full((before,), -INF)
    # nothing but -Inf: the first of all
    expected = before + want if any(x != -INF for x in row) else 0
    assert chosen(torch.cat([filler, torch.tensor(row)])[None]) == [expected]
    assert chosen(torch.cat([torch.tensor(row), filler])[None]) == [want]


def test_the_first_nan_is_found_by_any_number_of_threads(threads: Callable[[int], None], isa: str) -> None:
    logits = torch.zeros(3, 300_000)
    logits[0, [5, 150_007, 290_000]] = torch.tensor([9.0, NAN, NAN])
    logits[1, 299_999] = NAN
    logits[2, [0, 299_999]] = torch.tensor([NAN, INF])
    for count in (1, 2, 3, 7):
        threads(count)
        assert chosen(logits) == [150_007, 299_999, 0], count


def test_the_largest_is_found_wherever_it_stands(isa: str) -> None:
    logits = torch.zeros(1100, 1100)
    logits.fill_diagonal_(1.0)
    assert chosen(logits) == list(range(1100))


def test_threads_agree_on_the_first_of_equals(threads: Callable[[int], None], isa: str) -> None:
    logits = torch.zeros(2, 300_000)
    logits[0, [7, 99_999, 150_000, 299_999]] = 5.0
    logits[1, [150_000, 200_001]] = 5.0
    for count in (1, 2, 3, 7):
        threads(count)
        assert chosen(logits) == [7, 150_000], count


def test_nothing_is_written_around_the_ids() -> None:
    buffer = torch.full((7,), -5)
    next_token(torch.eye(3), buffer[2:5])
    assert buffer.tolist() == [-5, -5, 0, 1, 2, -5, -5]


BAD = {
    "logits_1d": (torch.ones(5), torch.zeros(1, dtype=torch.int64), r"logits: expected shape \[1, \*\], got \[5\]"),
    "logits_half": (torch.ones(1, 5).half(), torch.zeros(1, dtype=torch.int64), "logits: expected dtype float32"),
    "logits_rows": (torch.ones(2, 5), torch.zeros(1, dtype=torch.int64), r"logits: expected shape \[1, \*\], got \[2, 5\]"),
    "logits_empty": (torch.ones(1, 0), torch.zeros(1, dtype=torch.int64), "logits: expected at least one column"),
    "logits_strided": (torch.ones(1, 8)[:, ::2], torch.zeros(1, dtype=torch.int64), "logits: expected a dense last"),
    "ids_scalar": (torch.ones(1, 5), torch.tensor(0), r"ids: expected shape \[\*\], got \[\]"),
    "ids_2d": (torch.ones(1, 5), torch.zeros(1, 1, dtype=torch.int64), r"ids: expected shape \[\*\], got \[1, 1\]"),
    "ids_int32": (torch.ones(1, 5), torch.zeros(1, dtype=torch.int32), "ids: expected dtype int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str) -> None:
    logits, ids, message = BAD[name]
    with pytest.raises(InputError, match=f"^next_token: {message}"):
        next_token(logits, ids)
    assert not ids.any()


def test_advance_adds_one_to_both() -> None:
    position = torch.tensor([0, 5, -3], dtype=torch.int32)
    slots = torch.tensor([77, 4, 5, 6, 77], dtype=torch.int32)
    advance(position, slots[1:4])
    advance(position, slots[1:4])
    assert position.tolist() == [2, 7, -1]
    assert slots.tolist() == [77, 6, 7, 8, 77]


@pytest.mark.parametrize(
    ("position", "slot", "message"),
    [
        (torch.tensor(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), r"position: expected shape \[\*\], got \[\]"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), "position: expected dtype int32"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), r"slot: expected shape \[2\], got \[3\]"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2), "slot: expected dtype int32"),
    ],
    ids=["position_scalar", "position_int64", "slot_long", "slot_float"],
)  # fmt: skip
def test_a_bad_advance_changes_nothing(position: torch.Tensor, slot: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"^advance: {message}"):
        advance(position, slot)
    assert not position.any()
    assert not slot.any()
