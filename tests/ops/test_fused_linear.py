"""fused_linear: rows on their own, what is written, bad values and bad calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.fused_linear import Mode, Weight, fused_linear, reference
from llmopt.ops.fused_linear.spec import bits_of, make_inputs, run, weight_data, weights_of
from llmopt.ops.spec import Case

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

QKV = ((70, "int4"), (37, "int8"), (16, "int4a"))


def given(tokens: int = 9, k: int = 200, weights: Any = QKV, **params: Any) -> dict[str, Any]:
    return make_inputs(Case("given", {"tokens": tokens, "k": k, "weights": weights, **params}), 3)


def weight(kind: str = "int4", rows: int = 40, cols: int = 200, group: int = 128) -> Weight:
    data = weight_data(kind, rows, cols, group, torch.Generator().manual_seed(1))
    return Weight(data, rows, cols, bits_of(kind), group, kind.endswith("a"))


def rows_of(inputs: dict[str, Any], which: slice) -> dict[str, Any]:
    return inputs | {name: inputs[name][which] for name in ("x", "base") if inputs[name] is not None}


@pytest.mark.parametrize("mode", ["store", "add", "swiglu"])
@pytest.mark.parametrize("kinds", [("int4", "int4"), ("int8a", "int8a"), ("int4a", "int4")], ids=str)
def test_a_token_alone_gives_what_it_gives_in_a_batch(mode: Mode, kinds: tuple[str, str], isa: str) -> None:
    inputs = given(64, weights=tuple((85, kind) for kind in kinds), mode=mode, norm=True)
    whole = run(**inputs)
    for size in (1, 2, 3, 8, 9, 31):
        parts = [run(**rows_of(inputs, slice(at, at + size))) for at in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize("kind", ["int4", "int8a", "bf16", "f32"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 40])
def test_threads_share_large_weights_bit_by_bit(kind: str, tokens: int, threads: Callable[[int], None]) -> None:
    # more bytes than one thread gets alone, so that the shares' edges lie inside the weights
    inputs = given(tokens, 512, ((300, kind), (37, "int4"), (160, kind)), norm=True)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(run(**inputs))
    assert all(torch.equal(each, results[0]) for each in results)


def test_weights_together_give_what_they_give_alone(isa: str) -> None:
    inputs = given(5, norm=True, bias=(1,))
    weights = weights_of(200, *(inputs[name] for name in ("rows", "bits", "asymmetric", "group_size")), inputs)
    alone = []
    for each in weights:
        alone.append(torch.empty(5, each.rows))
        fused_linear(inputs["x"], [each], alone[-1], norm=inputs["norm"], eps=inputs["eps"])
    assert torch.equal(run(**inputs), torch.cat(alone, dim=1))


@pytest.mark.parametrize("mode", ["store", "add", "swiglu"])
@pytest.mark.parametrize("kind", ["int4", "int8", "f32", "bf16", "f16"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
def test_nothing_is_written_around_the_output(mode: Mode, kind: str, tokens: int, isa: str) -> None:
    inputs = given(tokens, weights=((37, kind), (37, kind)), mode=mode)
    expected = run(**inputs)
    buffer = torch.full((tokens + 2, expected.shape[1] + 13), 777.0)
    out = buffer[1:-1, 3 : 3 + expected.shape[1]]
    if mode == "add":
        out.copy_(inputs["base"])
    weights = [Weight(inputs[f"weight_{i}"], 37, 200, bits_of(kind)) for i in range(2)]
    fused_linear(inputs["x"], weights, out, mode=mode)
    assert torch.equal(out, expected)
    out.fill_(777.0)
    assert (buffer == 777.0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("kind", ["int4", "int8a", "f32", "bf16", "f16"])
def test_a_bad_value_reaches_its_token_and_no_other(kind: str, norm: bool, bad: float, isa: str) -> None:
    for tokens in (3, 11):
        inputs = given(tokens, weights=((37, kind),), norm=norm)
        expected = run(**inputs)
        inputs["x"][2, 71] = bad
        got = run(**inputs)
        assert not torch.isfinite(got[2]).any()
        others = torch.arange(tokens) != 2
        assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("tokens", [1, 2, 3, 10])
@pytest.mark.parametrize("kind", ["int4", "f32", "bf16"])
def test_a_bad_value_reaches_the_gated_output(kind: str, tokens: int, isa: str) -> None:
    inputs = given(tokens, weights=((37, kind),) * 2, mode="swiglu", norm=True)
    inputs["x"][0, 5] = torch.nan
    got = run(**inputs)
    assert got[0].isnan().all()
    assert torch.isfinite(got[1:]).all()


@pytest.mark.parametrize("kind", ["int4", "f32"])
def test_a_bad_norm_or_bias_reaches_the_output(kind: str, isa: str) -> None:
    inputs = given(3, weights=((37, kind),), norm=True, bias=(0,))
    inputs["bias_0"][4] = torch.nan
    got = run(**inputs)
    assert got[:, 4].isnan().all()
    assert torch.isfinite(got[:, 5:]).all()
    inputs["norm"][9] = torch.nan
    assert run(**inputs).isnan().all()


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e15], ids=str)
def test_extreme_activations(value: float, isa: str) -> None:
    inputs = given(3, norm=True)
    inputs["x"] = torch.full_like(inputs["x"], value)
    weights = weights_of(200, *(inputs[name] for name in ("rows", "bits", "asymmetric", "group_size")), inputs)
    expected = reference.fused_linear(inputs["x"], weights, torch.empty(0), norm=inputs["norm"], eps=1e-6)
    torch.testing.assert_close(run(**inputs), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_mode_adds_to_what_is_there_each_time() -> None:
    x, out = torch.ones(2, 200), torch.zeros(2, 40)
    for _ in range(3):
        fused_linear(x, [weight("f32")], out, mode="add")
    torch.testing.assert_close(out, 3 * (x @ weight("f32").data.T))


def test_x_may_be_a_piece_of_wider_rows(isa: str) -> None:
    wide = torch.randn(5, 900)
    got, expected = torch.empty(5, 40), torch.empty(5, 40)
    fused_linear(wide[:, 300:500], [weight()], got)
    fused_linear(wide[:, 300:500].contiguous(), [weight()], expected)
    assert torch.equal(got, expected)


X, OUT = torch.ones(3, 200), (3, 40)
W = weight()
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x_1d": ({"x": torch.ones(200)}, r"x: expected shape \[\*, \*\], got \[200\]"),
    "x_double": ({"x": X.double()}, "x: expected dtype float32, bfloat16 or float16"),
    "x_strided": ({"x": torch.ones(3, 400)[:, ::2]}, "x: expected a dense last dimension, got stride 2"),
    "x_narrow": ({"x": X[:, :130]}, r"weights: expected x's 130 columns, got \[200\]"),
    "no_weights": ({"weights": []}, "weights: expected one to four, each with rows, bits and asymmetric, got 0"),
    "five_weights": ({"weights": [W] * 5}, "weights: expected one to four, .* got 5"),
    "group_sizes": ({"weights": [W, weight(group=64)]}, r"weights: expected one group size, got \[64, 128\]"),
    "group_size": ({"weights": [replace(W, group_size=48)]}, "group_size: expected 32, 64 or 128, got 48"),
    "bits": ({"weights": [replace(W, bits=5)]}, "bits: expected 4, 8, 16 or 32, got 5"),
    "bits_8": ({"weights": [replace(W, bits=8)]}, r"weights: expected shape \[3, \d+\], got \[3, \d+\]"),
    "asymmetric": ({"weights": [replace(W, asymmetric=True)]}, "weights: expected shape"),
    "rows": ({"weights": [replace(W, rows=49)]}, r"weights: expected shape \[4, "),
    "no_rows": ({"weights": [replace(W, rows=0)]}, "rows: expected at least 1, got 0"),
    "rows_minus": ({"weights": [replace(weight("f32"), rows=-1)]}, "rows: expected at least 1, got -1"),
    "packed_int8": ({"weights": [replace(W, data=W.data.view(torch.int8))]}, "weights: expected dtype uint8"),
    "plain_strided": ({"weights": [Weight(torch.ones(200, 40).T, 40, 200, 32)]}, "weights: expected a"),
    "plain_dtypes": ({"weights": [weight("f32", 20), weight("bf16", 20)]}, "weights: expected one dtype for all that"),
    "bias_short": ({"weights": [replace(W, bias=torch.ones(39))]}, r"biases: expected shape \[40\], got \[39\]"),
    "bias_half": ({"weights": [replace(W, bias=torch.ones(40).half())]}, "biases: expected dtype float32"),
    "norm_short": ({"norm": torch.ones(199)}, r"norm: expected shape \[200\], got \[199\]"),
    "norm_half": ({"norm": torch.ones(200).half()}, "norm: expected dtype float32"),
    "out_narrow": ({"out": torch.zeros(3, 39)}, r"out: expected shape \[3, 40\], got \[3, 39\]"),
    "out_short": ({"out": torch.zeros(2, 40)}, r"out: expected shape \[3, \*\], got \[2, 40\]"),
    "out_scalar": ({"out": torch.tensor(1.0)}, r"out: expected shape \[3, \*\], got \[\]"),
    "out_half": ({"out": torch.zeros(OUT).half()}, "out: expected dtype float32"),
    "mode": ({"mode": "gelu"}, r"mode: expected store \| add \| swiglu, got 'gelu'"),
    "swiglu_one": ({"mode": "swiglu"}, "weights: expected gate and up of one shape and one number of bits"),
    "swiglu_bits": ({"mode": "swiglu", "weights": [W, weight("int8")]}, "weights: expected gate and up"),
    "swiglu_rows": ({"mode": "swiglu", "weights": [W, weight(rows=41)]}, "weights: expected gate and up"),
    "swiglu_bias": ({"mode": "swiglu", "weights": [W, replace(W, bias=torch.ones(40))]}, "biases: .* none with swiglu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str) -> None:
    change, message = BAD[name]
    arguments: dict[str, Any] = {"x": X, "weights": [W], "out": torch.zeros(OUT), **change}
    before = arguments["out"].clone()
    with pytest.raises(InputError, match=f"^fused_linear: {message}"):
        fused_linear(**arguments)
    assert torch.equal(arguments["out"], before)
