"""int4_experts: routing, extremes and bad calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops import SPECS
from llmopt.ops.int4_experts import int4_experts, reference
from llmopt.ops.int4_experts.spec import make_inputs
from llmopt.ops.spec import Case

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

PARAMS = {"tokens": 9, "experts": 5, "top_k": 2, "hidden": 72, "intermediate": 40, "group": 64, "down_group": 32}


def given(**change: Any) -> dict[str, Any]:
    return make_inputs(Case("own", PARAMS | change), 0)


def check(inputs: dict[str, Any]) -> torch.Tensor:
    got = int4_experts(**inputs)
    torch.testing.assert_close(got, reference.experts(**inputs), rtol=1e-4, atol=2e-4)
    return got


@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_may_go_to_one_expert(expert: int, isa: str) -> None:
    inputs = given(top_k=1, tokens=40)
    inputs["index"] = torch.full_like(inputs["index"], expert)
    check(inputs)


def test_a_token_may_choose_one_expert_twice(isa: str) -> None:
    inputs = given()
    inputs["index"][:, 1] = inputs["index"][:, 0]
    check(inputs)


def test_the_order_of_the_choices_does_not_matter_much(isa: str) -> None:
    inputs = given()
    expected = check(inputs)
    turned = inputs | {"index": inputs["index"].flip(1), "weights": inputs["weights"].flip(1)}
    torch.testing.assert_close(int4_experts(**turned), expected, rtol=1e-5, atol=1e-6)


def test_one_token_alone_gives_what_it_gives_in_a_batch(isa: str) -> None:
    inputs = given(tokens=45)
    whole = int4_experts(**inputs)
    rows = [int4_experts(**(inputs | {k: inputs[k][t : t + 1] for k in ("x", "index", "weights")})) for t in range(45)]
    assert torch.equal(whole, torch.cat(rows))


@pytest.mark.parametrize("weight", [0.0, -1.5, 1e4], ids=["zero", "negative", "large"])
def test_router_weights_scale_the_output(weight: float, isa: str) -> None:
    inputs = given(top_k=1)
    ones = int4_experts(**(inputs | {"weights": torch.ones_like(inputs["weights"])}))
    got = int4_experts(**(inputs | {"weights": torch.full_like(inputs["weights"], weight)}))
    torch.testing.assert_close(got, ones * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["f64", "bf16", "f16"])
def test_router_weights_may_have_any_float_dtype(dtype: torch.dtype) -> None:
    inputs = given()
    inputs["weights"] = inputs["weights"].to(dtype)
    check(inputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=["i32", "i16", "u8"])
def test_the_index_may_have_any_integer_dtype(dtype: torch.dtype) -> None:
    inputs = given()
    expected = int4_experts(**inputs)
    assert torch.equal(int4_experts(**(inputs | {"index": inputs["index"].to(dtype)})), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_bad_token_spoils_itself_only(bad: float, isa: str) -> None:
    inputs = given(tokens=31)
    expected = int4_experts(**inputs)
    inputs["x"][7, 71] = bad
    got = int4_experts(**inputs)
    assert not torch.isfinite(got[7]).any()
    others = torch.arange(31) != 7
    assert torch.equal(got[others], expected[others])


def test_a_bad_router_weight_spoils_its_token_only(isa: str) -> None:
    inputs = given()
    expected = int4_experts(**inputs)
    inputs["weights"][3, 1] = torch.nan
    got = int4_experts(**inputs)
    assert torch.isnan(got[3]).all()
    others = torch.arange(9) != 3
    assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("value", [0.0, 1e12, 1e-38], ids=["zero", "huge", "tiny"])
def test_extreme_activations(value: float, isa: str) -> None:
    inputs = given()
    inputs["x"] = torch.full_like(inputs["x"], value)
    got, expected = int4_experts(**inputs), reference.experts(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert bool(got.any()) == (value > 1)


def test_overflow_of_the_gate_reaches_the_output(isa: str) -> None:
    inputs = given()
    inputs["x"][2] = 1e30
    got = int4_experts(**inputs)
    assert not torch.isfinite(got[2]).any()
    assert torch.isfinite(got[[0, 1, 3, 4, 5, 6, 7, 8]]).all()


def test_more_tokens_than_one_chunk_of_scratch(isa: str) -> None:
    if isa == "portable":
        pytest.skip("too slow without vectors")
    # 64 MiB of scratch hold 64 Mi / (k * (2 I + H) * 4) tokens
    inputs = given(tokens=15000, experts=2, top_k=2, hidden=32, intermediate=512, group=32, down_group=128)
    got = int4_experts(**inputs)
    for at in (0, 7000, 7942, 7943, 7944, 14999):
        alone = int4_experts(**(inputs | {k: inputs[k][at : at + 1] for k in ("x", "index", "weights")}))
        assert torch.equal(got[at : at + 1], alone), at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_nothing_is_written_around_the_output(dtype: torch.dtype, isa: str) -> None:
    inputs = given(dtype=dtype)
    expected = int4_experts(**inputs)
    buffer = torch.full((11, 72 + 13), 777.0, dtype=dtype)
    out = buffer[1:-1, 3:75]
    native.library().int4_experts(
        inputs["x"], inputs["index"], inputs["weights"], inputs["gate_up"], inputs["down"], out, 40, 64, 32, False
    )
    assert torch.equal(out, expected)
    out.fill_(777.0)
    assert (buffer == 777.0).all()


@pytest.mark.parametrize("wrong", [5, -1, 2**33], ids=["one_too_many", "negative", "huge"])
def test_an_expert_that_does_not_exist_is_an_index_error(wrong: int) -> None:
    inputs = given()
    inputs["index"][4, 1] = wrong
    with pytest.raises(IndexError, match=rf"index: expected values in \[0, 5\), got {wrong}"):
        int4_experts(**inputs)


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "x_1d": (lambda g: {"x": g["x"][0]}, "x"),
    "x_3d": (lambda g: {"x": g["x"][None]}, "x"),
    "x_scalar": (lambda g: {"x": torch.tensor(1.0)}, "x"),
    "x_narrow": (lambda g: {"x": g["x"][:, :64]}, "gate_up"),
    "x_double": (lambda g: {"x": g["x"].double()}, "x"),
    "index_1d": (lambda g: {"index": g["index"][:, 0]}, "index"),
    "index_short": (lambda g: {"index": g["index"][:-1]}, "index"),
    "index_empty": (lambda g: {"index": g["index"][:, :0], "weights": g["weights"][:, :0]}, "index"),
    "index_float": (lambda g: {"index": g["index"].float()}, "index"),
    "index_bool": (lambda g: {"index": g["index"] > 0}, "index"),
    "weights_narrow": (lambda g: {"weights": g["weights"][:, :1]}, "weights"),
    "gate_up_2d": (lambda g: {"gate_up": g["gate_up"][0]}, "gate_up"),
    "gate_up_int8": (lambda g: {"gate_up": g["gate_up"].view(torch.int8)}, "gate_up"),
    "down_fewer": (lambda g: {"down": g["down"][:-1]}, "down"),
    "down_strided": (lambda g: {"down": g["down"].transpose(0, 1).contiguous().transpose(0, 1)}, "down"),
    "intermediate": (lambda g: {"intermediate": 41}, "gate_up"),
    "intermediate_0": (lambda g: {"intermediate": 0}, "gate_up"),
    "intermediate_minus": (lambda g: {"intermediate": -40}, "gate_up"),
    "group": (lambda g: {"group_size": 48}, "group_size"),
    "down_group": (lambda g: {"down_group_size": 16}, "group_size"),
    "asymmetric": (lambda g: {"asymmetric": True}, "gate_up"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument(name: str) -> None:
    change, named = BAD[name]
    inputs = given()
    with pytest.raises(InputError, match=rf"\b{named}: "):
        int4_experts(**(inputs | change(inputs)))


@pytest.mark.parametrize("seed", range(6))
def test_all_tokens_but_one_on_a_tie_agree_closely(seed: int, isa: str) -> None:
    """The op's tolerance has room for one code of a token on the other side of a tie; all others have no use for it."""
    spec = SPECS["int4_experts"]
    inputs = spec.make_inputs(next(case for case in spec.cases if case.name == "asymmetric"), seed)
    worst = (spec.run(**inputs) - spec.reference(**inputs)).abs().amax(1).sort().values
    assert worst[-2] < 5e-6
    assert worst[-1] < 5e-3
