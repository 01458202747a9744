"""int4_linear and its packed layout: what the generic tests cannot know."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.int4_linear import int4_linear, layout, reference

needs_kernels = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


def codes(
    n: int, k: int, group: int, *, bits: int = 4, asymmetric: bool = False, lead: tuple[int, ...] = (), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    q = torch.randint(0, 2**bits, (*lead, n, k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(*lead, n, groups, generator=g) * 0.02 + 0.001).to(torch.float16)
    zeros = torch.randint(0, 2**bits, (*lead, n, groups), generator=g, dtype=torch.uint8) if asymmetric else None
    return q, scales, zeros


def weight(n: int = 37, k: int = 192, group: int = 64, *, asymmetric: bool = False, bits: int = 4) -> torch.Tensor:
    return layout.pack(*codes(n, k, group, bits=bits, asymmetric=asymmetric), group_size=group, bits=bits)


# ---- layout

SIZES = [(1, 1), (1, 4), (15, 31), (16, 32), (17, 33), (37, 200), (48, 128), (33, 257)]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=["plain", "experts", "two_dims"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_gives_back_what_pack_took(bits: int, asymmetric: bool, lead: tuple[int, ...]) -> None:
    for (n, k), group in itertools.product(SIZES, layout.KERNEL_GROUPS):
        q, scales, zeros = codes(n, k, group, bits=bits, asymmetric=asymmetric, lead=lead, seed=n * k)
        packed = layout.pack(q, scales, zeros, group_size=group, bits=bits)
        assert packed.dtype == torch.uint8
        assert packed.is_contiguous()
        assert tuple(packed.shape) == (*lead, *layout.packed_shape(n, k, group, bits=bits, asymmetric=asymmetric))
        back = layout.unpack(packed, out_features=n, in_features=k, group_size=group, bits=bits, asymmetric=asymmetric)
        assert torch.equal(back[0], q)
        assert torch.equal(back[1], scales)
        assert back[2] is None if zeros is None else torch.equal(back[2], zeros)
        expected = (q.float() - (2.0 ** (bits - 1) if zeros is None else spread(zeros.float(), group, k))) * spread(
            scales.float(), group, k
        )
        dequantized = layout.dequantize(
            packed, out_features=n, in_features=k, group_size=group, bits=bits, asymmetric=asymmetric
        )
        assert torch.equal(dequantized, expected)


def spread(x: torch.Tensor, group: int, k: int) -> torch.Tensor:
    return x.repeat_interleave(group, -1)[..., :k]


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
def test_padding_stands_for_zero(asymmetric: bool) -> None:
    n, k, group = 5, 40, 32
    packed = weight(n, k, group, asymmetric=asymmetric)
    whole = layout.dequantize(packed, out_features=16, in_features=64, group_size=group, bits=4, asymmetric=asymmetric)
    assert not whole[:n, k:].any()
    assert not whole[n:].any()


def test_a_tile_is_one_block_of_whole_lines() -> None:
    for k, group, bits in itertools.product((1, 64, 200, 1024), layout.KERNEL_GROUPS, (4, 8)):
        for asymmetric in (False, True):
            assert layout.tile_bytes(k, group, bits=bits, asymmetric=asymmetric) % 64 == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_without_zeros_is_of_another_size_than_one_with(bits: int) -> None:
    for k, group in itertools.product((1, 64, 200, 1024, 2048), layout.KERNEL_GROUPS):
        with_zeros, without = (layout.tile_bytes(k, group, bits=bits, asymmetric=x) for x in (True, False))
        assert with_zeros > without


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"group_size": 48}, "group_size"),
        ({"bits": 3}, "bits"),
        ({"q": torch.zeros(5, 64, dtype=torch.int64)}, "q"),
        ({"q": torch.zeros(64, dtype=torch.uint8)}, "q"),
        ({"q": torch.full((5, 64), 16, dtype=torch.uint8)}, "q"),
        ({"scales": torch.ones(5, 2)}, "scales"),
        ({"scales": torch.full((5, 1), 1e5)}, "scales"),
        ({"scales": torch.full((5, 1), torch.nan)}, "scales"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, "zeros"),
    ],
    ids=["group", "bits", "dtype", "one_dim", "fifth_bit", "scale_shape", "scale_inf", "scale_nan", "zero_shape"],
)
def test_pack_refuses(change: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(5, 64, dtype=torch.uint8), "scales": torch.ones(5, 1), "zeros": None, "group_size": 64, "bits": 4,
    } | change  # fmt: skip
    q, scales, zeros = given.pop("q"), given.pop("scales"), given.pop("zeros")
    with pytest.raises(InputError, match=f"^{named}: "):
        layout.pack(q, scales, zeros, **given)


# ---- the kernel


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 30])
def test_nothing_is_written_around_the_output(tokens: int, dtype: torch.dtype, isa: str) -> None:
    n, k = 37, 192
    packed = weight(n, k)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = int4_linear(x, packed, out_features=n, group_size=64)
    for offset in (1, 3, 8):
        buffer = torch.full((tokens + 2, n + 20), 777.0, dtype=dtype)
        y = buffer[1:-1, offset : offset + n]
        native.library().int4_linear_into(x, packed, None, y, 64, False)
        assert torch.equal(y, expected)
        y.fill_(777.0)
        assert (buffer == 777.0).all()


@needs_kernels
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
def test_one_token_alone_gives_what_it_gives_in_a_batch(asymmetric: bool, isa: str) -> None:
    packed = weight(asymmetric=asymmetric)
    x = torch.randn(41, 192, generator=torch.Generator().manual_seed(1))

    def run(rows: torch.Tensor) -> torch.Tensor:
        return int4_linear(rows, packed, out_features=37, group_size=64, asymmetric=asymmetric)

    assert torch.equal(run(x), torch.cat([run(row[None]) for row in x]))


@needs_kernels
def test_leading_dimensions_are_kept(isa: str) -> None:
    packed = weight()
    x = torch.randn(2, 3, 192)
    flat = int4_linear(x.view(6, 192), packed, out_features=37, group_size=64)
    assert torch.equal(int4_linear(x, packed, out_features=37, group_size=64), flat.view(2, 3, 37))
    assert torch.equal(int4_linear(x[0, 0], packed, out_features=37, group_size=64), flat[0])
    assert int4_linear(x[:, :0], packed, out_features=37, group_size=64).shape == (2, 0, 37)
    assert int4_linear(x[None, :0], packed, out_features=37, group_size=64).shape == (1, 0, 3, 37)


@needs_kernels
def test_columns_and_repeated_rows_are_read_right(isa: str) -> None:
    packed = weight()
    x = torch.randn(4, 192)
    expected = int4_linear(x, packed, out_features=37, group_size=64)
    assert torch.equal(int4_linear(x.T.contiguous().T, packed, out_features=37, group_size=64), expected)
    repeated = x[1:2].expand(3, 192)
    assert torch.equal(int4_linear(repeated, packed, out_features=37, group_size=64), expected[1:2].expand(3, 37))


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 2, 3, 24, 29])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus_inf"])
def test_a_bad_token_spoils_itself_only(bad: float, tokens: int, isa: str) -> None:
    packed = weight()
    x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(2))
    expected = int4_linear(x, packed, out_features=37, group_size=64)
    for column in (0, 63, 64, 191):
        broken = x.clone()
        broken[tokens // 2, column] = bad
        got = int4_linear(broken, packed, out_features=37, group_size=64)
        assert not torch.isfinite(got[tokens // 2]).any(), column
        others = torch.arange(tokens) != tokens // 2
        assert torch.equal(got[others], expected[others]), column


@needs_kernels
@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, 1e-38, 1e-42], ids=["zero", "huge", "minus", "tiny", "subnormal"])
def test_extreme_activations(value: float, isa: str) -> None:
    packed = weight()
    x = torch.full((3, 192), value)
    x[1] = torch.randn(192, generator=torch.Generator().manual_seed(3))
    got = int4_linear(x, packed, out_features=37, group_size=64)
    expected = reference.linear(x, packed, None, out_features=37, group_size=64, asymmetric=False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    if abs(value) < 1e-30:
        assert not got[[0, 2]].any()


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 2, 13, 30])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("code", [0, 15])
def test_extreme_codes_do_not_overflow(code: int, asymmetric: bool, tokens: int, isa: str) -> None:
    n, k, group = 20, 512, 128
    q = torch.full((n, k), code, dtype=torch.uint8)
    zeros = torch.full((n, 4), 15 - code, dtype=torch.uint8) if asymmetric else None
    packed = layout.pack(q, torch.full((n, 4), 0.01), zeros, group_size=group, bits=4)
    for sign in (1.0, -1.0):
        x = torch.full((tokens, k), sign)
        got = int4_linear(x, packed, out_features=n, group_size=group, asymmetric=asymmetric)
        zero = 15 - code if asymmetric else 8
        expected = torch.full_like(got, sign * k * (code - zero) * float(torch.tensor(0.01).half()))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@needs_kernels
def test_scales_of_zero_below_zero_and_subnormal(isa: str) -> None:
    q, _, _ = codes(20, 128, 32)
    smallest = torch.finfo(torch.float16).smallest_normal
    scales = torch.tensor([0.0, -0.5, smallest / 8, -smallest / 1024]).repeat(20, 1)
    packed = layout.pack(q, scales, None, group_size=32, bits=4)
    for tokens in (1, 3, 30):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(4)) * 100
        got = int4_linear(x, packed, out_features=20, group_size=32)
        expected = reference.linear(x, packed, None, out_features=20, group_size=32, asymmetric=False)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-3)
        only_subnormal = x.clone()
        only_subnormal[:, :64] = 0
        got = int4_linear(only_subnormal, packed, out_features=20, group_size=32)
        expected = reference.linear(only_subnormal, packed, None, out_features=20, group_size=32, asymmetric=False)
        assert got.any()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_small_activations_beside_an_outlier_group_keep_their_own_scale(isa: str) -> None:
    packed = weight(16, 128, 64)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(5))
    x[:, :64] *= 1e6
    outlier = int4_linear(x, packed, out_features=16, group_size=64)
    x[:, :64] = 0
    alone = int4_linear(x, packed, out_features=16, group_size=64)
    exact = x @ layout.dequantize(packed, out_features=16, in_features=128, group_size=64, bits=4, asymmetric=False).T
    assert torch.isfinite(outlier).all()
    torch.testing.assert_close(alone, exact, rtol=0.02, atol=0.02)


@needs_kernels
def test_large_sums_stay_finite_in_half_precision(isa: str) -> None:
    packed = layout.pack(torch.full((16, 1024), 9, dtype=torch.uint8), torch.ones(16, 8), None, group_size=128, bits=4)
    y = int4_linear(torch.full((1, 1024), 60.0, dtype=torch.float16), packed, out_features=16, group_size=128)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), torch.full((1, 16), 61440.0), rtol=1e-3, atol=0)


def bad(**change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: given | {key: make(given) for key, make in change.items()}


@needs_kernels
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (bad(x=lambda g: torch.tensor(1.0)), "x"),
        (bad(x=lambda g: g["x"].double()), "x"),
        (bad(x=lambda g: g["x"].int()), "x"),
        (bad(x=lambda g: g["x"][:, :100]), "packed"),
        (bad(x=lambda g: g["x"][:, :0]), "packed"),
        (bad(x=lambda g: g["x"][None, :, :0]), "packed"),
        (bad(out_features=lambda g: 0), "out_features"),
        (bad(out_features=lambda g: -1), "out_features"),
        (bad(out_features=lambda g: 49, bias=lambda g: None), "packed"),
        (bad(group_size=lambda g: 48), "group_size"),
        (bad(group_size=lambda g: 0), "group_size"),
        (bad(group_size=lambda g: -1), "group_size"),
        (bad(group_size=lambda g: 128), "packed"),
        (bad(asymmetric=lambda g: True), "packed"),
        (bad(packed=lambda g: g["packed"].view(torch.int8)), "packed"),
        (bad(packed=lambda g: g["packed"].float()), "packed"),
        (bad(packed=lambda g: torch.cat([g["packed"]] * 2, 1)[:, : g["packed"].shape[1]]), "packed"),
        (bad(packed=lambda g: g["packed"].view(-1)), "packed"),
        (bad(packed=lambda g: g["packed"][None]), "packed"),
        (bad(packed=lambda g: g["packed"][:-1]), "packed"),
        (bad(bias=lambda g: g["bias"][:-1]), "bias"),
        (bad(bias=lambda g: g["bias"][None]), "bias"),
        (bad(bias=lambda g: g["bias"].half()), "bias"),
        (bad(bias=lambda g: g["bias"].int()), "bias"),
        (bad(bias=lambda g: torch.zeros(74)[::2]), "bias"),
    ],
    ids=[
        "x_scalar", "x_double", "x_int", "x_narrow", "x_no_columns", "x_no_columns_3d", "no_rows", "minus_rows",
        "too_many_rows", "group_48", "group_0", "group_minus", "other_group", "not_asymmetric", "packed_int8",
        "packed_float", "packed_strided", "packed_flat", "packed_3d", "packed_short", "bias_short", "bias_2d",
        "bias_half", "bias_int", "bias_strided",
    ],
)  # fmt: skip
def test_bad_calls_name_the_argument(change: Callable[[dict[str, Any]], dict[str, Any]], named: str) -> None:
    given = {
        "x": torch.randn(3, 192), "packed": weight(), "bias": torch.randn(37), "out_features": 37, "group_size": 64,
        "asymmetric": False,
    }  # fmt: skip
    with pytest.raises(InputError, match=rf"\b{named}: "):
        int4_linear(**change(given))
