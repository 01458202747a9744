"""rope_cache: tokens on their own, what is written, bad values and bad calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.rope_cache import rope_cache
from llmopt.ops.rope_cache.spec import SPEC, make_inputs, run
from llmopt.ops.spec import Case

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

HEADS, KV_HEADS, DIM = 4, 2, 40
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
PER_TOKEN = ("qkv", "position", "seq", "slot")


def given(tokens: int = 6, **params: Any) -> dict[str, Any]:
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "sequences": 2, "norm": "qk", "rotary": 24, **params}
    return make_inputs(Case("given", {"tokens": tokens, **shape}), 5)


def token(inputs: dict[str, Any], t: int) -> dict[str, Any]:
    return inputs | {name: inputs[name][t : t + 1] for name in PER_TOKEN}


def parts(flat: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What run() gave: q ``[T, H, D]`` and both caches ``[2, S, Hk, C, D]``."""
    cache = inputs["cache"]
    return flat[: -cache.numel()].view(-1, HEADS, DIM), flat[-cache.numel() :].view(cache.shape)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_a_token_alone_gives_what_it_gives_in_a_batch(interleaved: bool, dtype: torch.dtype, isa: str) -> None:
    inputs = given(64, dtype=dtype, interleaved=interleaved)
    q, cache = parts(run(**inputs), inputs)
    for t in range(64):
        own_q, own_cache = parts(run(**token(inputs, t)), inputs)
        s, slot = int(inputs["seq"][t]), int(inputs["slot"][t])
        assert torch.equal(own_q[0], q[t])
        assert torch.equal(own_cache[:, s, :, slot], cache[:, s, :, slot])


def test_threads_share_the_heads_bit_by_bit(threads: Callable[[int], None]) -> None:
    inputs = given(300, dim=128, rotary=128)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(**inputs))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@DTYPES
def test_only_the_tokens_slots_are_written(dtype: torch.dtype, isa: str) -> None:
    inputs = given(dtype=dtype)
    _, cache = parts(run(**inputs), inputs)
    untouched = torch.ones(inputs["cache"].shape[1:4:2], dtype=torch.bool)
    untouched[inputs["seq"].long(), inputs["slot"].long()] = False
    untouched = untouched[:, None].expand(-1, KV_HEADS, -1)
    for before, now in zip(inputs["cache"], cache, strict=True):
        assert torch.equal(before[untouched], now[untouched])
        assert (before[~untouched] != now[~untouched]).any(-1).all()


@DTYPES
def test_values_are_copied_and_the_rest_of_a_head_is_not_turned(dtype: torch.dtype, isa: str) -> None:
    inputs = given(norm="")
    inputs["cache"] = inputs["cache"].to(dtype)
    q, cache = parts(run(**inputs), inputs)
    heads = inputs["qkv"].view(-1, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    seq, slot = inputs["seq"].long(), inputs["slot"].long()
    assert torch.equal(cache[1][seq, :, slot], heads[:, HEADS + KV_HEADS :])
    assert torch.equal(cache[0][seq, :, slot][..., 24:], heads[:, HEADS : HEADS + KV_HEADS, 24:])
    assert torch.equal(q[..., 24:], heads[:, :HEADS, 24:])


@DTYPES
def test_nothing_is_written_around_the_outputs(dtype: torch.dtype, isa: str) -> None:
    inputs = given(dtype=dtype)
    cache = inputs.pop("cache")
    sizes = [6 * HEADS * DIM, cache[0].numel(), cache[0].numel()]
    shapes = [(6, HEADS, DIM), cache.shape[1:], cache.shape[1:]]
    buffers = [torch.full((size + 30,), 777.0, dtype=dtype) for size in sizes]
    q, k, v = (b[13 : 13 + n].view(s) for b, n, s in zip(buffers, sizes, shapes, strict=True))
    k.copy_(cache[0])
    v.copy_(cache[1])
    rope_cache(q=q, k=k, v=v, **inputs)
    assert torch.equal(torch.cat([x.flatten() for x in (q, k, v)]), run(cache, **inputs))
    for x in (q, k, v):
        x.fill_(777.0)
    assert all((b == 777.0).all() for b in buffers)


@pytest.mark.parametrize("norm", ["", "qk"], ids=["plain", "norm"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_bad_value_reaches_its_head_only(bad: float, norm: str, isa: str) -> None:
    inputs = given(norm=norm)
    expected_q, expected = parts(run(**inputs), inputs)
    heads = inputs["qkv"].view(6, HEADS + 2 * KV_HEADS, DIM)
    for head in (1, HEADS, HEADS + KV_HEADS + 1):  # of q, k and v
        heads[3, head, 30] = bad
    q, cache = parts(run(**inputs), inputs)
    seq, slot = inputs["seq"].long(), inputs["slot"].long()
    q_bad, k_bad, v_bad = (~x.isfinite() for x in (q, cache[0][seq, :, slot], cache[1][seq, :, slot]))
    assert q_bad.any(-1).nonzero().tolist() == [[3, 1]]
    assert k_bad.any(-1).nonzero().tolist() == [[3, 0]]
    assert v_bad.nonzero().tolist() == [[3, 1, 30]]
    assert torch.equal(q[[0, 1, 2, 4, 5]], expected_q[[0, 1, 2, 4, 5]])
    others = torch.tensor([0, 1, 2, 4, 5])
    assert torch.equal(cache[:, seq[others], :, slot[others]], expected[:, seq[others], :, slot[others]])


def test_heads_of_any_scale_are_normalized(isa: str) -> None:
    inputs = given(norm="qk")
    inputs["qkv"][0] = 0.0
    q, _ = parts(run(**inputs), inputs)
    assert not q[0].any()
    inputs["qkv"][1] = 1e15
    assert torch.isfinite(run(**inputs)).all()


@pytest.mark.parametrize(("name", "end"), [("position", 18), ("seq", 2), ("slot", 9)])
def test_a_token_outside_is_an_index_error_and_nothing_is_written(name: str, end: int) -> None:
    for wrong in (end, -1, 2**31 - 1):
        inputs = given()
        inputs[name][5] = wrong
        cache = inputs.pop("cache")
        q, k, v = torch.full((6, HEADS, DIM), 777.0), cache[0].clone(), cache[1].clone()
        with pytest.raises(IndexError, match=rf"{name}: expected values in \[0, {end}\), got {wrong}"):
            rope_cache(q=q, k=k, v=v, **inputs)
        assert (q == 777.0).all()
        assert torch.equal(torch.stack([k, v]), cache)


Change = Callable[[dict[str, Any]], Any]
BAD: dict[str, tuple[str, Change, str]] = {
    "qkv_1d": ("qkv", lambda g: g["qkv"][0], r"qkv: expected shape \[6, 320\], got \[320\]"),
    "qkv_narrow": ("qkv", lambda g: g["qkv"][:, :-1], r"qkv: expected shape \[6, 320\], got \[6, 319\]"),
    "qkv_half": ("qkv", lambda g: g["qkv"].half(), "qkv: expected dtype float32"),
    "qkv_strided": ("qkv", lambda g: torch.ones(6, 640)[:, ::2], "qkv: expected a dense last dimension, got stride 2"),
    "q_2d": ("q", lambda g: g["q"].flatten(1), r"q: expected shape \[\*, \*, 40\], got \[6, 160\]"),
    "q_dim": ("q", lambda g: torch.zeros(6, 4, 39), r"q: expected shape \[\*, \*, 40\]"),
    "q_dtype": ("q", lambda g: g["q"].half(), "q: expected the dtype of k"),
    "q_strided": ("q", lambda g: torch.zeros(4, 6, 40).transpose(0, 1), "q: expected a contiguous tensor"),
    "q_tokens": ("q", lambda g: g["q"][:5], r"qkv: expected shape \[5, 320\]"),
    "k_3d": ("k", lambda g: g["k"][0], r"k: expected shape \[\*, \*, \*, \*\]"),
    "k_double": ("k", lambda g: g["k"].double(), "k: expected dtype float32, bfloat16 or float16"),
    "k_strided": ("k", lambda g: torch.zeros(2, 9, 2, 40).transpose(1, 2), "k: expected a contiguous tensor"),
    "v_shape": ("v", lambda g: g["v"][:1], r"v: expected shape \[2, 2, 9, 40\], got \[1, 2, 9, 40\]"),
    "v_dtype": ("v", lambda g: g["v"].half(), "v: expected the dtype of k"),
    "v_strided": ("v", lambda g: torch.zeros(2, 9, 2, 40).transpose(1, 2), "v: expected a contiguous tensor"),
    "cos_1d": ("cos", lambda g: g["cos"][0], r"cos: expected shape \[\*, \*\], got \[12\]"),
    "cos_half": ("cos", lambda g: g["cos"].half(), "cos: expected dtype float32"),
    "cos_wide": ("cos", lambda g: torch.ones(18, 21), r"sin: expected shape \[18, 21\], got \[18, 12\]"),
    "sin_short": ("sin", lambda g: g["sin"][1:], r"sin: expected shape \[18, 12\], got \[17, 12\]"),
    "sin_strided": ("sin", lambda g: torch.ones(18, 20)[:, :12], "sin: expected a contiguous tensor"),
    "position_short": ("position", lambda g: g["position"][:5], r"position: expected shape \[6\], got \[5\]"),
    "position_int64": ("position", lambda g: g["position"].long(), "position: expected dtype int32"),
    "seq_float": ("seq", lambda g: g["seq"].float(), "seq: expected dtype int32"),
    "slot_2d": ("slot", lambda g: g["slot"][None], r"slot: expected shape \[6\], got \[1, 6\]"),
    "q_norm_short": ("q_norm", lambda g: g["q_norm"][1:], r"q_norm: expected shape \[40\], got \[39\]"),
    "k_norm_half": ("k_norm", lambda g: g["k_norm"].half(), "k_norm: expected dtype float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str) -> None:
    argument, change, message = BAD[name]
    inputs = given()
    cache = inputs.pop("cache")
    inputs |= {"q": torch.zeros(6, HEADS, DIM), "k": torch.zeros(cache.shape[1:]), "v": torch.zeros(cache.shape[1:])}
    inputs[argument] = change(inputs)
    with pytest.raises(InputError, match=f"^rope_cache: {message}"):
        rope_cache(**inputs)
    assert not any(inputs[out].any() for out in ("q", "k", "v"))


def test_more_turned_than_a_head_has() -> None:
    inputs = given()
    inputs["cos"] = inputs["sin"] = torch.ones(18, 21)
    with pytest.raises(InputError, match=r"^rope_cache: cos: expected at most 20 columns"):
        run(**inputs)


def test_a_head_too_large() -> None:
    with pytest.raises(InputError, match=r"^rope_cache: q: expected a head size of at most 512, got 516"):
        run(**make_inputs(Case("big", {"tokens": 1, "heads": 1, "kv_heads": 1, "dim": 516}), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_that_are_rotated_already_are_only_written(dtype: torch.dtype, isa: str) -> None:
    case = Case("", {"tokens": 9, "heads": 3, "kv_heads": 1, "dim": 80, "sequences": 2, "dtype": dtype})
    inputs = SPEC.make_inputs(case, 3)
    still = {"cos": torch.ones_like(inputs["cos"]), "sin": torch.zeros_like(inputs["sin"])}
    outputs = []
    for tables in (still, {"cos": None, "sin": None, "position": None}):
        given = {**SPEC.torch_arguments(**inputs), **tables}
        rope_cache(**given)
        outputs.append([given[name] for name in ("q", "k", "v")])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("missing", [["cos"], ["sin"], ["position"], ["cos", "sin"], ["cos", "position"]])
def test_tables_come_together(missing: list[str]) -> None:
    inputs = SPEC.torch_arguments(**SPEC.make_inputs(Case("", {"tokens": 2, "heads": 2, "kv_heads": 1, "dim": 32}), 0))
    with pytest.raises(InputError, match="cos: expected sin and position beside it"):
        rope_cache(**{**inputs, **dict.fromkeys(missing)})
