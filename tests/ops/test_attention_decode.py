"""attention of few rows in bfloat16: with products of pairs (vdpbf16ps) and in float32, whatever this processor prefers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmopt import native
from llmopt.ops.attention import attention, reference
from llmopt.ops.attention.spec import SPEC

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no compiled kernels"),
    pytest.mark.usefixtures("nan_memory", "dots"),
]

RTOL, ATOL = SPEC.tolerance[torch.bfloat16]


@pytest.fixture(params=["on", "off"])
def dots(request: pytest.FixtureRequest) -> Iterator[str]:
    library = native.library()
    try:
        try:
            native.force_isa("avx512")
            library.force_bf16_dots(request.param)
        except ValueError as error:
            pytest.skip(str(error))
        yield request.param
    finally:
        native.force_isa("auto")
        library.force_bf16_dots("auto")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def inputs(group: int, queries: int, keys: int, dim: int, dim_v: int, heads: int = 2) -> dict[str, torch.Tensor]:
    return {
        "q": normal(1, heads * group, queries, dim, seed=0),
        "k": normal(1, heads, keys, dim, seed=1),
        "v": normal(1, heads, keys, dim_v, seed=2),
    }


def check(scale: float = 0.1, **given: torch.Tensor) -> None:
    got, want = attention(scale=scale, **given), reference.attention(scale=scale, **given)
    torch.testing.assert_close(got, want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("keys", [1, 2, 31, 33, 64, 700])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 23])
def test_any_number_of_rows_and_keys(group: int, keys: int) -> None:
    check(**inputs(group, 1, keys, 128, 128))


@pytest.mark.parametrize(
    ("dim", "dim_v"), [(32, 32), (64, 96), (96, 64), (256, 256), (192, 128), (80, 64), (64, 80), (20, 16)]
)
def test_any_size_of_a_head(dim: int, dim_v: int) -> None:
    check(**inputs(4, 1, 77, dim, dim_v))


@pytest.mark.parametrize("queries", [2, 3, 5])
def test_a_few_queries_see_what_comes_before_them(queries: int) -> None:
    check(**inputs(4, queries, 50, 64, 64))


@pytest.mark.parametrize("group", [2, 4, 6])
def test_a_token_among_a_few_has_the_numbers_it_has_alone(group: int) -> None:
    given = inputs(group, 3, 50, 64, 64)
    last = attention(**{**given, "q": given["q"][:, :, -1:]}, scale=0.1)
    assert torch.equal(attention(**given, scale=0.1)[:, -1:], last)


@pytest.mark.parametrize("window", [1, 40])
def test_a_window(window: int) -> None:
    given = inputs(4, 1, 150, 64, 64)
    got = attention(**given, scale=0.1, window=window)
    torch.testing.assert_close(got, reference.attention(**given, scale=0.1, window=window), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("rope", [32, 64, 24])
def test_a_second_part_of_keys(rope: int) -> None:
    q_rope, k_rope = normal(1, 8, 1, rope, seed=3), normal(1, 2, 45, rope, seed=4)
    check(**inputs(4, 1, 45, 64, 32), q_rope=q_rope, k_rope=k_rope)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hidden_key_reaches_nothing(value: float) -> None:
    given = inputs(8, 1, 75, 64, 64)
    visible = torch.ones(1, 75, dtype=torch.bool)
    visible[:, [0, 33, 74]] = False
    want = attention(**given, scale=0.1, key_mask=visible)
    for name in ("k", "v"):
        given[name][:, :, ~visible[0]] = value
    # such rows are computed again, key by key
    torch.testing.assert_close(attention(**given, scale=0.1, key_mask=visible), want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("which", ["k", "v"])
def test_a_key_that_is_not_a_number_is_seen(which: str) -> None:
    given = inputs(8, 1, 75, 64, 64)
    given[which][:, 0, 40] = float("nan")
    out = attention(**given, scale=0.1)
    assert out[:, :, :8].isnan().all()
    assert out[:, :, 8:].isfinite().all()


def test_views_that_are_not_dense() -> None:
    wide = normal(1, 60, 2, 160, seed=5)
    k, v = wide[..., :64].transpose(1, 2), wide[..., 64:128].transpose(1, 2)
    check(q=normal(1, 16, 1, 64, seed=6), k=k, v=v)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_keys_cut_among_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(**inputs(8, 1, 3000, 128, 128, heads=1))
    finally:
        torch.set_num_threads(before)
