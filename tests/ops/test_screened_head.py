"""screened_head: the 8-bit head's own argmax, its ties, NaN and Inf, and rows made to mislead the screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.fused_linear import Weight, fused_linear
from llmopt.ops.int4_linear import layout
from llmopt.ops.screened_head import MARGIN, reference, screened_head

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

NAN, INF = torch.nan, torch.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head(q: torch.Tensor, scales: torch.Tensor | float = 0.01, group: int = 64) -> Weight:
    n, k = q.shape
    if isinstance(scales, float):
        scales = torch.full((n, -(-k // group)), scales)
    return Weight(layout.pack(q, scales, None, group_size=group, bits=8), n, k, 8, group)


def random_head(n: int, k: int = 192, group: int = 64, seed: int = 0) -> Weight:
    g = generator(seed)
    scales = torch.rand(n, -(-k // group), generator=g) * 0.01
    return head(torch.randint(1, 256, (n, k), generator=g, dtype=torch.uint8), scales, group)


def chosen(x: torch.Tensor, weight: Weight, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and tiles scored with 8 bits."""
    ids, scored = torch.full((len(x),), -7), torch.full((len(x),), -7, dtype=torch.int32)
    screened_head(x, weight, ids, scored=scored, **options)
    return ids, scored


def all_logits(x: torch.Tensor, weight: Weight, **options: Any) -> torch.Tensor:
    logits = torch.empty(len(x), weight.rows)
    fused_linear(x, (weight,), logits, **options)
    return logits


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 33, 64])
@pytest.mark.parametrize("group", layout.KERNEL_GROUPS)
def test_the_token_of_the_whole_head(tokens: int, group: int, isa: str, nan_memory: None) -> None:
    weight = random_head(3003, 192, group)
    x = torch.randn(tokens, 192, generator=generator(1))
    norm = torch.rand(192, generator=generator(2)) + 0.5
    for options in ({}, {"norm": norm, "eps": 1e-5}):
        ids, scored = chosen(x, weight, **options)
        assert torch.equal(ids, all_logits(x, weight, **options).argmax(-1))
        # far from all of the 188 tiles
        assert (scored >= 1).all()
        assert (scored < 100).all()


def test_a_token_is_chosen_and_scored_the_same_in_any_batch(threads: Callable[[int], None], isa: str) -> None:
    weight, x = random_head(2000), torch.randn(20, 192, generator=generator(3))
    found = []
    for count in (1, 2, 3, 5):
        threads(count)
        found.append(torch.stack(chosen(x, weight)))
        found.append(torch.cat([torch.stack(chosen(x[i : i + 1], weight)) for i in range(20)], -1))
    assert all(torch.equal(found[0], other) for other in found)


def test_bounds_of_the_reference_hold_and_are_what_the_op_goes_by(isa: str) -> None:
    weight, x = random_head(4000), torch.randn(6, 192, generator=generator(4))
    coarse, unit = reference.screen(x, weight)
    exact = all_logits(x, weight)
    assert ((exact - coarse).abs() < MARGIN * unit).all()
    # evenly spread low nibbles: 4.6 to within a few hundredths
    assert float(((exact - coarse) / unit).std()) == pytest.approx(4.61, rel=0.03)
    for margin in (3.0, MARGIN):
        _, scored = chosen(x, weight, margin=margin)
        for t in range(len(x)):
            first = int(coarse[t].argmax()) // 16 * 16
            least = exact[t, first : first + 16].max()
            may_win = (coarse[t] + margin * unit[t] >= least).view(-1, 16).any(-1)
            assert abs(int(scored[t]) - int(may_win.sum())) <= 1  # rounding may move one over the line


def test_low_nibbles_decide(isa: str) -> None:
    # all rows look alike in 4 bits
    q = (
        torch.full((500, 128), 0x70, dtype=torch.uint8)
        + torch.randint(0, 16, (500, 128), generator=generator(5)).byte()
    )
    x = torch.randn(9, 128, generator=generator(6))
    weight = head(q)
    assert torch.equal(chosen(x, weight)[0], all_logits(x, weight).argmax(-1))


def test_a_margin_of_the_longest_possible_error_misses_nothing(isa: str) -> None:
    # every low nibble of row 777 goes with its input's sign: its logit is 7.5 * sum of |x| above what the screen sees
    x, q = torch.ones(1, 128), torch.full((1000, 128), 128, dtype=torch.uint8)
    x[:, 64:] = -1.0
    q[777, :64] = 128 + 15
    q[5, :61] = 128 + 16
    weight = head(q)
    assert int(all_logits(x, weight).argmax()) == 5
    q[5, :2] = 128
    weight = head(q)
    assert int(all_logits(x, weight).argmax()) == 777
    assert chosen(x, weight, margin=7.5 * 128**0.5)[0].tolist() == [777]
    # patterns of this kind are what the usual margin does not cover
    assert chosen(x, weight)[0].tolist() == [5]


def test_the_first_of_equals(threads: Callable[[int], None], isa: str) -> None:
    q = torch.randint(1, 255, (3000, 128), generator=generator(7), dtype=torch.uint8)
    for row in (2999, 1700, 40, 41):
        q[row] = 255
    weight, x = head(q), torch.ones(3, 128)
    for count in (1, 2, 3, 4):
        threads(count)
        assert chosen(x, weight)[0].tolist() == [40] * 3


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_bad_token_gets_the_token_argmax_gives_and_spoils_no_other(bad: float, tokens: int, isa: str) -> None:
    weight, x = random_head(700), torch.randn(tokens, 192, generator=generator(8))
    x[tokens // 2, 100] = bad
    logits = all_logits(x, weight)
    assert logits[tokens // 2].isnan().all()
    assert torch.equal(chosen(x, weight)[0], logits.argmax(-1))


def test_extreme_activations(isa: str) -> None:
    weight = random_head(700)
    signs = torch.randn(4, 192, generator=generator(9))
    for scale in (0.0, 1e-38, 1e-30, 1e30, 1e38):
        x = signs * scale
        logits = all_logits(x, weight)
        assert torch.equal(chosen(x, weight)[0], logits.argmax(-1)), scale


@pytest.mark.parametrize("scale", [0.0, 6e-8, 65504.0])
def test_extreme_scales(scale: float, isa: str) -> None:
    q = torch.randint(1, 256, (90, 128), generator=generator(10), dtype=torch.uint8)
    weight, x = head(q, scale), torch.randn(3, 128, generator=generator(11))
    assert torch.equal(chosen(x, weight)[0], all_logits(x, weight).argmax(-1))


def test_rows_that_all_lose_to_zero_do_not_lose_to_padding(isa: str) -> None:
    # 17 rows: the second tile has 15 rows of padding, whose logit would be 0
    q = torch.randint(1, 100, (17, 64), generator=generator(12), dtype=torch.uint8)
    weight, x = head(q), torch.ones(2, 64)
    logits = all_logits(x, weight)
    assert (logits < 0).all()
    ids, scored = chosen(x, weight)
    assert torch.equal(ids, logits.argmax(-1))
    assert (scored <= 2).all()


def test_nothing_is_written_around_the_outputs(isa: str) -> None:
    ids, scored = torch.full((8,), -5), torch.full((8,), -5, dtype=torch.int32)
    screened_head(torch.randn(4, 192, generator=generator(13)), random_head(100), ids[2:6], scored=scored[2:6])
    assert (ids[[0, 1, 6, 7]] == -5).all()
    assert (scored[[0, 1, 6, 7]] == -5).all()
    assert (ids[2:6] >= 0).all()


W, X = random_head(40), torch.randn(3, 192, generator=generator(14))
IDS = torch.zeros(3, dtype=torch.int64)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x_1d": ({"x": X[0]}, r"x: expected shape \[\*, \*\], got \[192\]"),
    "x_double": ({"x": X.double()}, "x: expected dtype float32"),
    "x_narrow": ({"x": X[:, :64]}, "weight: expected x's 64 columns, got 192"),
    "norm_short": ({"norm": torch.ones(191)}, r"norm: expected shape \[192\]"),
    "norm_half": ({"norm": torch.ones(192).half()}, "norm: expected dtype float32"),
    "ids_long": ({"ids": torch.zeros(4, dtype=torch.int64)}, r"ids: expected shape \[3\], got \[4\]"),
    "ids_int32": ({"ids": torch.zeros(3, dtype=torch.int32)}, "ids: expected dtype int64"),
    "scored_int64": ({"scored": torch.zeros(3, dtype=torch.int64)}, "scored: expected dtype int32"),
    "scored_short": ({"scored": torch.zeros(2, dtype=torch.int32)}, r"scored: expected shape \[3\], got \[2\]"),
    "margin": ({"margin": -1.0}, "margin: expected at least 0, got -1"),
    "margin_nan": ({"margin": NAN}, "margin: expected at least 0"),
    "four_bits": ({"weight": Weight(W.data, 40, 192, 4, 64)}, "weight: expected 8 bits, symmetric, no bias, got '4 bits"),
    "bias": ({"weight": Weight(W.data, 40, 192, 8, 64, bias=torch.zeros(40))}, "weight: expected 8 bits, symmetric, no bias"),
    "asymmetric": ({"weight": Weight(W.data, 40, 192, 8, 64, True)}, "weight: expected 8 bits, symmetric, no bias"),
    "rows": ({"weight": Weight(W.data, 100, 192, 8, 64)}, "packed: expected shape"),
    "no_rows": ({"weight": Weight(W.data, 0, 192, 8, 64)}, "packed: expected positive sizes"),
    "group": ({"weight": Weight(W.data, 40, 192, 8, 16)}, "group_size: expected 32, 64 or 128"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str) -> None:
    change, message = BAD[name]
    given: dict[str, Any] = {"x": X, "weight": W, "ids": IDS.clone()} | change
    with pytest.raises(InputError, match=f"^screened_head: {message}"):
        screened_head(**given)
    assert not given["ids"].any()
