"""int8_linear and quant_rows: the head and the embedding on one copy of the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.int4_linear import layout
from llmopt.ops.int8_linear import int8_linear, quant_rows, reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")
N, K, GROUP = 37, 200, 64


def packed(bits: int = 8, *, asymmetric: bool = False, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (N, K), generator=g, dtype=torch.uint8)
    scales = torch.rand(N, 4, generator=g) * 1e-3 + 1e-5
    zeros = torch.randint(0, 2**bits, (N, 4), generator=g, dtype=torch.uint8) if asymmetric else None
    return layout.pack(q, scales, zeros, group_size=GROUP, bits=bits)


def table(weight: torch.Tensor, bits: int = 8, *, asymmetric: bool = False) -> torch.Tensor:
    return layout.dequantize(weight, out_features=N, in_features=K, group_size=GROUP, bits=bits, asymmetric=asymmetric)


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
@pytest.mark.parametrize("code", [0, 1, 127, 128, 255])
def test_extreme_codes_do_not_saturate(code: int, tokens: int, isa: str) -> None:
    weight = layout.pack(
        torch.full((20, 512), code, dtype=torch.uint8), torch.full((20, 4), 0.01), None, group_size=128, bits=8
    )
    for sign in (1.0, -1.0):
        got = int8_linear(torch.full((tokens, 512), sign), weight, out_features=20, group_size=128)
        expected = torch.full_like(got, sign * 512 * (code - 128) * float(torch.tensor(0.01).half()))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 30])
def test_nothing_is_written_around_the_output(tokens: int, dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = int8_linear(x, packed(), bias, out_features=N, group_size=GROUP)
    buffer = torch.full((tokens + 2, N + 11), 777.0, dtype=dtype)
    y = buffer[1:-1, 3 : 3 + N]
    native.library().int8_linear_into(x, packed(), bias, y, GROUP)
    assert torch.equal(y, expected)
    y.fill_(777.0)
    assert (buffer == 777.0).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_bad_token_spoils_itself_only(bad: float, tokens: int, isa: str) -> None:
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(2))
    expected = int8_linear(x, packed(), out_features=N, group_size=GROUP)
    broken = x.clone()
    broken[tokens // 2, 199] = bad
    got = int8_linear(broken, packed(), out_features=N, group_size=GROUP)
    assert not torch.isfinite(got[tokens // 2]).any()
    others = torch.arange(tokens) != tokens // 2
    assert torch.equal(got[others], expected[others])


def test_extreme_activations(isa: str) -> None:
    for value in (0.0, 1e30, 1e-38):
        x = torch.full((3, K), value)
        got = int8_linear(x, packed(), out_features=N, group_size=GROUP)
        expected = reference.linear(x, packed(), None, out_features=N, group_size=GROUP)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.tensor(1.0)}, "x"),
        ({"x": torch.randn(3, K).double()}, "x"),
        ({"x": torch.randn(3, 64)}, "packed"),
        ({"packed": packed(4)}, "packed"),
        ({"packed": packed().view(-1)}, "packed"),
        ({"packed": packed().float()}, "packed"),
        ({"out_features": 0}, "out_features"),
        ({"out_features": 100}, "packed"),
        ({"group_size": 16}, "group_size"),
        ({"group_size": 128}, "packed"),
        ({"bias": torch.randn(N - 1)}, "bias"),
        ({"bias": torch.randn(N).bfloat16()}, "bias"),
    ],
    ids=[
        "scalar", "double", "narrow", "four_bits", "flat", "float_bytes", "no_rows", "too_many_rows", "group_16",
        "other_group", "bias_short", "bias_bf16",
    ],
)  # fmt: skip
def test_bad_calls_name_the_argument(change: dict[str, Any], named: str) -> None:
    given = {"x": torch.randn(3, K), "packed": packed(), "bias": None, "out_features": N, "group_size": GROUP}
    with pytest.raises(InputError, match=rf"\b{named}: "):
        int8_linear(**(given | change))


# ---- rows


@pytest.mark.parametrize(("bits", "asymmetric"), [(8, False), (4, False), (4, True)], ids=["8", "4", "4_asym"])
def test_rows_are_those_of_the_table_bit_by_bit(bits: int, asymmetric: bool, isa: str, nan_memory: None) -> None:
    weight = packed(bits, asymmetric=asymmetric)
    ids = torch.tensor([[36, 0, 5], [5, 17, 16]])
    got = quant_rows(ids, weight, out_features=N, in_features=K, group_size=GROUP, bits=bits, asymmetric=asymmetric)
    assert got.dtype == torch.float32
    assert torch.equal(got, table(weight, bits, asymmetric=asymmetric)[ids])


def test_every_row_of_a_large_lookup(isa: str, threads: Any) -> None:
    threads(2)
    ids = torch.randint(0, N, (700,), generator=torch.Generator().manual_seed(3))
    got = quant_rows(ids, packed(), out_features=N, in_features=K, group_size=GROUP, bits=8)
    assert torch.equal(got, table(packed())[ids])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1, 1)], ids=str)
def test_rows_keep_the_shape_of_the_ids(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int32)
    got = quant_rows(ids, packed(), out_features=N, in_features=K, group_size=GROUP, bits=8)
    assert got.shape == (*shape, K)


@pytest.mark.parametrize("wrong", [N, -1, 2**40], ids=["one_too_many", "negative", "huge"])
def test_an_id_outside_the_table_is_an_index_error(wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {N}\), got {wrong}"):
        quant_rows(torch.tensor([0, wrong]), packed(), out_features=N, in_features=K, group_size=GROUP, bits=8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ids": torch.tensor([1.7])}, "ids"),
        ({"ids": torch.tensor([True])}, "ids"),
        ({"bits": 4}, "packed"),
        ({"bits": 3}, "bits"),
        ({"group_size": 7}, "group_size"),
        ({"in_features": 0}, "in_features"),
        ({"in_features": -5}, "in_features"),
        ({"in_features": 300}, "packed"),
        ({"out_features": 64}, "packed"),
        ({"packed": packed()[:, :-1]}, "packed"),
        ({"asymmetric": True}, "packed"),
    ],
    ids=[
        "float_ids", "bool_ids", "four_bits", "three_bits", "group", "no_columns", "minus_columns", "wide", "tall",
        "strided", "asymmetric",
    ],
)  # fmt: skip
def test_bad_lookups_name_the_argument(change: dict[str, Any], named: str) -> None:
    given = {
        "ids": torch.tensor([1]), "packed": packed(), "out_features": N, "in_features": K, "group_size": GROUP, "bits": 8,
    }  # fmt: skip
    with pytest.raises(InputError, match=rf"\b{named}: "):
        quant_rows(**(given | change))
