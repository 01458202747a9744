"""rope_cache into an int8 cache: codes and scales, what is written, bad values and bad calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.rope_cache import reference, rope_cache
from llmopt.ops.rope_cache.spec import SPEC, make_inputs
from llmopt.ops.spec import Case, Inputs

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

HEADS, KV_HEADS, DIM = 4, 2, 40
SMALL = [case for case in SPEC.cases if not case.real]
PER_TOKEN = ("qkv", "position", "seq", "slot")


class Outputs(NamedTuple):
    q: torch.Tensor  # [T, H, D] bfloat16
    k: torch.Tensor  # [S, Hk, C, D] int8
    v: torch.Tensor
    k_scale: torch.Tensor  # [S, Hk, C] float32
    v_scale: torch.Tensor

    def read(self) -> torch.Tensor:
        """``[2, S, Hk, C, D]`` float32, keys and values as attention takes them."""
        return torch.stack([self.k * self.k_scale[..., None], self.v * self.v_scale[..., None]])


def given(tokens: int = 6, **params: Any) -> Inputs:
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "sequences": 2, "norm": "qk", "rotary": 24, **params}
    return make_inputs(Case("given", {"tokens": tokens, **shape}), 5)


def outputs(inputs: Inputs) -> Outputs:
    """Buffers that hold something: codes of 77 and scales of 5."""
    cache, tokens = inputs["cache"][0], inputs["qkv"].shape[0]
    heads = inputs["qkv"].shape[1] // cache.shape[3] - 2 * cache.shape[1]
    q = torch.full((tokens, heads, cache.shape[3]), torch.nan, dtype=torch.bfloat16)
    codes, scales = torch.full(cache.shape, 77, dtype=torch.int8), torch.full(cache.shape[:3], 5.0)
    return Outputs(q, codes, codes.clone(), scales, scales.clone())


def run(inputs: Inputs, function: Callable[..., Any] = rope_cache) -> Outputs:
    out = outputs(inputs)
    function(**{name: value for name, value in inputs.items() if name != "cache"}, **out._asdict())
    return out


def places(inputs: Inputs) -> torch.Tensor:
    """``[S, Hk, C]``: true where a token is written."""
    written = torch.zeros(inputs["cache"].shape[1:4], dtype=torch.bool)
    written[inputs["seq"].long(), :, inputs["slot"].long()] = True
    return written


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_of_the_spec(case: Case, isa: str) -> None:
    inputs = SPEC.make_inputs(case, 1)
    got, expected = run(inputs), run(inputs, reference.rope_cache)
    torch.testing.assert_close(got.q, expected.q, rtol=8e-3, atol=1e-3)
    # values are only rounded; a key that was turned may fall to the other side of a half
    assert torch.equal(got.v, expected.v)
    assert torch.equal(got.v_scale, expected.v_scale)
    torch.testing.assert_close(got.k_scale, expected.k_scale, rtol=1e-5, atol=0)
    off = (got.k.int() - expected.k.int()).abs()
    assert off.numel() == 0 or int(off.max()) <= 1
    assert int(off.sum()) <= 2 + off.numel() // 1000


def test_what_is_read_back_is_off_by_half_a_step(isa: str) -> None:
    inputs = given(64, dim=128, rotary=128)
    plain = {**inputs, "q": outputs(inputs).q.float(), "k": inputs["cache"][0].clone(), "v": inputs["cache"][1].clone()}
    plain.pop("cache")
    rope_cache(**plain)
    got, written = run(inputs), places(inputs)
    scales = torch.stack([got.k_scale, got.v_scale])
    error = (got.read() - torch.stack([plain["k"], plain["v"]])).abs()
    assert (error <= 0.501 * scales[..., None])[:, written].all()
    tops = torch.stack([got.k, got.v]).abs().amax(-1)
    assert (tops[:, written] == 127).all()


def test_a_token_alone_gives_what_it_gives_in_a_batch(isa: str) -> None:
    inputs = given(64)
    whole = run(inputs)
    for t in range(64):
        own = run(inputs | {name: inputs[name][t : t + 1] for name in PER_TOKEN})
        assert torch.equal(own.q[0], whole.q[t])
        at = int(inputs["seq"][t]), slice(None), int(inputs["slot"][t])
        assert all(torch.equal(a[at], b[at]) for a, b in zip(own[1:], whole[1:], strict=True))


def test_threads_share_the_heads_bit_by_bit(threads: Callable[[int], None]) -> None:
    inputs, results = given(300, dim=128, rotary=128), []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(inputs))
    assert all(torch.equal(a, b) for each in results for a, b in zip(each, results[0], strict=True))


def test_only_the_tokens_slots_are_written(isa: str) -> None:
    inputs = given()
    got, written = run(inputs), places(inputs)
    for codes, scales in ((got.k, got.k_scale), (got.v, got.v_scale)):
        assert (codes[~written] == 77).all()
        assert (scales[~written] == 5.0).all()
        assert (scales[written] != 5.0).all()


@pytest.mark.parametrize("dim", [2, 20, 40, 128])
def test_nothing_is_written_around_the_outputs(dim: int, isa: str) -> None:
    inputs = given(dim=dim, rotary=2)
    expected = run(inputs)
    buffers = [torch.full((x.numel() + 30,), 77, dtype=x.dtype) for x in expected]
    views = [b[13 : 13 + x.numel()].view(x.shape) for b, x in zip(buffers, expected, strict=True)]
    for view, before in zip(views, outputs(inputs), strict=True):
        view.copy_(before)
    rope_cache(**{n: x for n, x in inputs.items() if n != "cache"}, **Outputs(*views)._asdict())
    for view, want in zip(views, expected, strict=True):
        assert torch.equal(view, want)
        view.fill_(77)
    assert all((b == 77).all() for b in buffers)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-29, 1e-8, 1e8, 3e38])
def test_heads_of_any_size(size: float, isa: str) -> None:
    inputs = given(norm="")
    values = torch.rand(DIM, generator=torch.Generator().manual_seed(1)) * 2 - 1
    values[3] = 1.0
    heads = inputs["qkv"].view(6, HEADS + 2 * KV_HEADS, DIM)
    heads[2, -1] = values * size
    got = run(inputs)
    at = int(inputs["seq"][2]), KV_HEADS - 1, int(inputs["slot"][2])
    if size < 1e-30:
        assert not got.v[at].any()
        assert got.v_scale[at] == 0.0
    else:
        assert int(got.v[at][3]) == 127
        error = (got.read()[1][at].double() - heads[2, -1].double()).abs()
        assert float(error.max()) <= 0.501 * float(got.v_scale[at])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_value_reaches_its_head_only(bad: float, isa: str) -> None:
    inputs = given(norm="")
    expected = run(inputs)
    heads = inputs["qkv"].view(6, HEADS + 2 * KV_HEADS, DIM)
    heads[3, HEADS, 30] = heads[3, HEADS + KV_HEADS + 1, 30] = bad
    got = run(inputs)
    spoiled = torch.zeros(2, *inputs["cache"].shape[1:4], dtype=torch.bool)
    s, slot = int(inputs["seq"][3]), int(inputs["slot"][3])
    spoiled[0, s, 0, slot] = spoiled[1, s, 1, slot] = True
    assert not got.read()[spoiled].isfinite().any()
    assert torch.equal(got.read()[~spoiled], expected.read()[~spoiled])


Change = Callable[[Inputs], Any]
BAD: dict[str, tuple[str, Change, str]] = {
    "q_float": ("q", lambda g: g["q"].float(), "q: expected dtype bfloat16 beside an int8 cache"),
    "k_uint8": ("k", lambda g: g["k"].to(torch.uint8), "k: expected dtype"),
    "v_bf16": ("v", lambda g: g["v"].bfloat16(), "v: expected the dtype of k"),
    "no_k_scale": ("k_scale", lambda g: None, "k_scale: expected scales for an int8 cache"),
    "no_v_scale": ("v_scale", lambda g: None, "v_scale: expected scales for an int8 cache"),
    "scale_short": ("k_scale", lambda g: g["k_scale"][..., 1:], r"k_scale: expected shape \[2, 2, 9\]"),
    "scale_half": ("v_scale", lambda g: g["v_scale"].half(), "v_scale: expected dtype float32"),
    "scale_strided": ("k_scale", lambda g: torch.ones(2, 2, 10)[..., 1:], "k_scale: expected a contiguous"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str) -> None:
    argument, change, message = BAD[name]
    inputs = given()
    made = outputs(inputs)._asdict()
    inputs.pop("cache")
    call = inputs | made
    call[argument] = change(call)
    with pytest.raises(InputError, match=f"^rope_cache: {message}"):
        rope_cache(**call)
    assert made["q"].isnan().all()
    assert (made["k"] == 77).all()
    assert (made["v_scale"] == 5.0).all()


def test_scales_of_another_cache() -> None:
    inputs = given()
    cache = inputs.pop("cache")
    q, scales = torch.zeros(6, HEADS, DIM), torch.zeros(cache.shape[1:4])
    with pytest.raises(InputError, match=r"^rope_cache: v_scale: expected scales for an int8 cache, and for no"):
        rope_cache(q=q, k=cache[0], v=cache[1], v_scale=scales, **inputs)


def test_torch_sees_a_proper_op() -> None:
    inputs = given()
    call = {name: value for name, value in inputs.items() if name != "cache"} | outputs(inputs)._asdict()
    op = torch.ops.llmopt.rope_cache.default
    outcome = torch.library.opcheck(op, [call[argument.name] for argument in op._schema.arguments])
    assert set(outcome.values()) == {"SUCCESS"}, outcome
