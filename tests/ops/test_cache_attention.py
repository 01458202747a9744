"""cache_attention: rows on their own, slots that must not matter, bad values and bad calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.attention import attention
from llmopt.ops.cache_attention import cache_attention, reference
from llmopt.ops.cache_attention.spec import make_inputs, run
from llmopt.ops.spec import Case

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

HEADS, KV_HEADS, DIM = 6, 2, 40
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.int8: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16", "f16", "int8"])  # of the cache
DECODE = tuple((s, 37 * s % 600, 1) for s in range(20))
MIXED = ((0, 0, 63), (1, 500, 1), (2, 20, 8), (3, 90, 1))


def given(*chunks: tuple[int, int, int], **params: Any) -> dict[str, Any]:
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, **params}
    if shape.get("dtype") == torch.int8:
        shape |= {"dtype": torch.bfloat16, "int8": True}
    return make_inputs(Case("given", {"chunks": chunks, **shape}), 5)


def rows(inputs: dict[str, Any], which: slice) -> dict[str, Any]:
    return inputs | {name: inputs[name][which] for name in ("q", "seq", "slot")}


def floats(inputs: dict[str, Any], name: str) -> torch.Tensor:
    """What holds NaN or infinity where there is one: of an int8 cache, the scales."""
    found: torch.Tensor = inputs.get(f"{name}_scale", inputs[name])
    return found


@DTYPES
def test_a_decode_row_alone_gives_what_it_gives_in_a_batch(dtype: torch.dtype, isa: str) -> None:
    inputs = given(*DECODE, dtype=dtype)
    whole = run(**inputs)
    for size in (1, 3):
        parts = [run(**rows(inputs, slice(at, at + size))) for at in range(0, len(DECODE), size)]
        assert torch.equal(torch.cat(parts), whole), size


@DTYPES
def test_threads_share_the_work_bit_by_bit(dtype: torch.dtype, isa: str, threads: Callable[[int], None]) -> None:
    for chunks in (MIXED, ((0, 1500, 1),), ((0, 700, 100),)):
        inputs = given(*chunks, dtype=dtype)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(run(**inputs))
        assert all(torch.equal(each, results[0]) for each in results)


@DTYPES
def test_a_whole_prompt_is_what_attention_gives(dtype: torch.dtype, isa: str) -> None:
    inputs = given((0, 0, 90), dtype=dtype, spare=0)
    k, v = inputs["k"], inputs["v"]
    if dtype == torch.int8:
        k, v = ((inputs[n] * inputs[f"{n}_scale"][..., None]).bfloat16() for n in ("k", "v"))
    expected = attention(inputs["q"].transpose(0, 1)[None], k, v, scale=inputs["scale"])
    rtol = 8e-3 if dtype == torch.int8 else 1e-5  # bfloat16's rounding of values above one
    torch.testing.assert_close(run(**inputs), expected.flatten(2)[0], rtol=rtol, atol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(
    "chunks", [((0, 4, 1), (1, 20, 1)), ((0, 4, 20), (1, 20, 3)), ((0, 300, 1), (1, 600, 40))], ids=["1", "n", "long"]
)
def test_slots_that_no_row_sees_do_not_matter(chunks: Any, bad: float, dtype: torch.dtype, isa: str) -> None:
    inputs = given(*chunks, dtype=dtype, spare=70, start=[3, 11], sequences=2)
    expected = run(**inputs)
    for cache in (floats(inputs, "k"), floats(inputs, "v")):
        for s, first, count in chunks:
            cache[s, :, : int(inputs["start"][s])] = bad
            cache[s, :, first + count :] = bad
    assert torch.equal(run(**inputs), expected)


def test_a_row_does_not_see_the_rows_behind_it(isa: str) -> None:
    inputs = given((0, 10, 30))
    expected = run(**inputs)
    inputs["k"][:, :, 25:] = 1e4
    inputs["v"][:, :, 25:] = -1e4
    got = run(**inputs)
    assert torch.equal(got[:15], expected[:15])
    assert (got[15:] != expected[15:]).any(-1).all()


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_bad_query_spoils_its_head_only(bad: float, dtype: torch.dtype, isa: str) -> None:
    inputs = given(*MIXED, dtype=dtype)
    expected = run(**inputs).view(-1, HEADS, DIM)
    bad_rows = torch.tensor([10, 63, 70])
    inputs["q"][bad_rows, 4, 7] = bad
    got = run(**inputs).view(-1, HEADS, DIM)
    spoiled = torch.zeros(got.shape[:2], dtype=torch.bool)
    spoiled[bad_rows, 4] = True
    assert not got[spoiled].isfinite().any()
    assert torch.equal(got[~spoiled], expected[~spoiled])


@DTYPES
def test_a_bad_key_or_value_reaches_the_rows_that_see_it(dtype: torch.dtype, isa: str) -> None:
    for name in ("k", "v"):
        inputs = given((0, 0, 40), (1, 300, 1), dtype=dtype)
        expected = run(**inputs).view(-1, HEADS, DIM)
        floats(inputs, name)[0, 1, 0] = torch.nan
        got = run(**inputs).view(-1, HEADS, DIM)
        assert got[:40, 3:].isnan().all()
        assert torch.equal(got[:40, :3], expected[:40, :3])
        assert torch.equal(got[40], expected[40])


@DTYPES
def test_nothing_is_written_around_the_output(dtype: torch.dtype, isa: str) -> None:
    inputs = given(*MIXED, dtype=dtype)
    size = len(inputs["seq"]) * HEADS * DIM
    buffer = torch.full((size + 30,), 777.0, dtype=inputs["q"].dtype)
    out = buffer[13 : 13 + size].view(-1, HEADS * DIM)
    cache_attention(out=out, **inputs)
    assert torch.equal(out, run(**inputs))
    out.fill_(777.0)
    assert (buffer == 777.0).all()


def test_large_scores_do_not_overflow(isa: str) -> None:
    inputs = given((0, 0, 20), (1, 300, 1))
    inputs["q"] *= 1e3
    got = run(**inputs)
    assert got.isfinite().all()
    # nearly one key each: the scores are thousands, off by a few 2**-13
    torch.testing.assert_close(got, reference.cache_attention(**inputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("chunks", [((0, 300, 1),), ((0, 0, 9), (1, 20, 3)), ((0, 0, 90),)], ids=["1", "n", "long"])
def test_scales_of_any_size(chunks: Any, isa: str) -> None:
    """Keys and values that are zero, the smallest and the largest codes, scales far apart."""
    inputs = given(*chunks, dtype=torch.int8)
    for name, factor in (("k", 1e-3), ("v", 1e30)):
        codes, scales = inputs[name], inputs[f"{name}_scale"]
        codes[:, 0] = 0
        codes[:, 1, ::3], codes[:, 1, 1::3] = 127, -128
        scales *= factor * 10.0 ** (torch.arange(scales.shape[2]) % 5)
        scales[:, :, 2::7] = 0.0
    expected = reference.cache_attention(**inputs)
    assert expected.isfinite().all()
    torch.testing.assert_close(run(**inputs), expected, rtol=3e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e-3, 10.0])
def test_queries_of_any_size_over_an_int8_cache(size: float, isa: str) -> None:
    """Decode takes them as int16, with a scale: one element that is large must not spoil the others."""
    inputs = given((0, 300, 1), (1, 20, 1), (2, 0, 1), dtype=torch.int8)
    inputs["q"] *= size
    inputs["q"][:, 1, 3] *= 50.0
    torch.testing.assert_close(run(**inputs), reference.cache_attention(**inputs), rtol=1.6e-2, atol=4e-3)


@pytest.mark.parametrize(("name", "end"), [("seq", 2), ("slot", 29)])
def test_a_row_outside_the_cache_is_an_index_error_and_nothing_is_written(name: str, end: int) -> None:
    for wrong in (end, -1, 2**31 - 1):
        inputs = given((0, 5, 3), (1, 26, 1))
        inputs[name][3] = wrong
        out = torch.full((4, HEADS * DIM), 777.0)
        with pytest.raises(IndexError, match=rf"{name}: expected values in \[0, {end}\), got {wrong}"):
            cache_attention(out=out, **inputs)
        assert (out == 777.0).all()


@pytest.mark.parametrize("wrong", [-1, 6])
def test_a_start_behind_the_row_is_an_index_error(wrong: int) -> None:
    inputs = given((0, 5, 3), (1, 26, 1), start=[wrong, 0])
    with pytest.raises(IndexError, match=rf"start: expected values in \[0, slot\], got {wrong} for slot 5"):
        run(**inputs)


Change = Callable[[dict[str, Any]], Any]
BAD: dict[str, tuple[str, Change, str]] = {
    "q_2d": ("q", lambda g: g["q"].flatten(1), r"q: expected shape \[\*, \*, 40\], got \[4, 240\]"),
    "q_dim": ("q", lambda g: torch.ones(4, 6, 39), r"q: expected shape \[\*, \*, 40\]"),
    "q_dtype": ("q", lambda g: g["q"].half(), "q: expected the dtype of k"),
    "q_strided": ("q", lambda g: torch.ones(6, 4, 40).transpose(0, 1), "q: expected a contiguous tensor"),
    "q_heads": ("q", lambda g: torch.ones(4, 5, 40), r"out: expected shape \[4, 200\], got \[4, 240\]"),
    "q_tokens": ("q", lambda g: g["q"][:3], r"out: expected shape \[3, 240\]"),
    "k_3d": ("k", lambda g: g["k"][0], r"k: expected shape \[\*, \*, \*, \*\]"),
    "k_double": ("k", lambda g: g["k"].double(), "k: expected dtype float32, bfloat16 or float16"),
    "k_strided": ("k", lambda g: torch.ones(2, 29, 2, 40).transpose(1, 2), "k: expected a contiguous tensor"),
    "v_shape": ("v", lambda g: g["v"][:, :, 1:], r"v: expected shape \[2, 2, 29, 40\], got \[2, 2, 28, 40\]"),
    "v_dtype": ("v", lambda g: g["v"].half(), "v: expected the dtype of k"),
    "out_narrow": ("out", lambda g: g["out"][:, 1:], r"out: expected shape \[4, 240\], got \[4, 239\]"),
    "out_dtype": ("out", lambda g: g["out"].half(), "out: expected the dtype of k"),
    "out_strided": ("out", lambda g: torch.zeros(4, 300)[:, :240], "out: expected a contiguous tensor"),
    "seq_int64": ("seq", lambda g: g["seq"].long(), "seq: expected dtype int32"),
    "seq_short": ("seq", lambda g: g["seq"][1:], r"seq: expected shape \[4\], got \[3\]"),
    "slot_float": ("slot", lambda g: g["slot"].float(), "slot: expected dtype int32"),
    "slot_2d": ("slot", lambda g: g["slot"][None], r"slot: expected shape \[4\], got \[1, 4\]"),
    "start_short": ("start", lambda g: g["slot"][:1], r"start: expected shape \[2\], got \[1\]"),
    "start_int64": ("start", lambda g: g["slot"][:2].long(), "start: expected dtype int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str) -> None:
    argument, change, message = BAD[name]
    inputs = given((0, 5, 3), (1, 26, 1)) | {"out": torch.zeros(4, HEADS * DIM)}
    inputs[argument] = change(inputs)
    with pytest.raises(InputError, match=f"^cache_attention: {message}"):
        cache_attention(**inputs)
    assert not inputs["out"].any()


BAD_INT8: dict[str, tuple[str, Change, str]] = {
    "q_float": ("q", lambda g: g["q"].float(), "q: expected dtype bfloat16 beside an int8 cache"),
    "out_half": ("out", lambda g: g["out"].half(), "out: expected dtype bfloat16 beside an int8 cache"),
    "k_uint8": ("k", lambda g: g["k"].to(torch.uint8), "k: expected dtype"),
    "k_bf16": ("k", lambda g: g["k"].bfloat16(), "v: expected the dtype of k"),
    "v_bf16": ("v", lambda g: g["v"].bfloat16(), "v: expected the dtype of k"),
    "no_k_scale": ("k_scale", lambda g: None, "k_scale: expected scales for an int8 cache"),
    "no_v_scale": ("v_scale", lambda g: None, "v_scale: expected scales for an int8 cache"),
    "scale_short": ("k_scale", lambda g: g["k_scale"][..., 1:], r"k_scale: expected shape \[2, 2, 29\]"),
    "scale_of_heads": ("v_scale", lambda g: g["v_scale"][..., 0], r"v_scale: expected shape \[2, 2, 29\]"),
    "scale_half": ("v_scale", lambda g: g["v_scale"].half(), "v_scale: expected dtype float32"),
    "scale_strided": ("k_scale", lambda g: torch.ones(2, 2, 30)[..., 1:], "k_scale: expected a contiguous"),
}


@pytest.mark.parametrize("name", BAD_INT8)
def test_bad_calls_of_an_int8_cache(name: str) -> None:
    argument, change, message = BAD_INT8[name]
    inputs = given((0, 5, 3), (1, 26, 1), dtype=torch.int8) | {"out": torch.zeros(4, HEADS * DIM).bfloat16()}
    inputs[argument] = change(inputs)
    with pytest.raises(InputError, match=f"^cache_attention: {message}"):
        cache_attention(**inputs)
    assert not inputs["out"].any()


def test_a_head_too_large_for_int8() -> None:
    inputs = given((0, 0, 1), heads=1, kv_heads=1, dim=4097, dtype=torch.int8)
    with pytest.raises(
        InputError, match=r"^cache_attention: k: expected a head size of at most 4096 in int8, got 4097"
    ):
        run(**inputs)


def test_scales_of_another_cache() -> None:
    inputs = given((0, 5, 3), (1, 26, 1)) | {"k_scale": torch.ones(2, KV_HEADS, 29)}
    with pytest.raises(InputError, match=r"^cache_attention: k_scale: expected scales for an int8 cache, and for no"):
        run(**inputs)


@pytest.mark.parametrize(("heads", "kv_heads", "message"), [
    (5, 2, "k: expected a number of heads that divides q's 5, got 2"),
    (4, 0, "k: expected a number of heads that divides q's 4, got 0"),
    (0, 2, "q: expected at least one head"),
])  # fmt: skip
def test_numbers_of_heads_that_do_not_fit(heads: int, kv_heads: int, message: str) -> None:
    with pytest.raises(InputError, match=f"^cache_attention: {message}"):
        run(**given((0, 5, 3), heads=heads, kv_heads=kv_heads))


def test_a_head_of_no_values() -> None:
    with pytest.raises(InputError, match=r"^cache_attention: q: expected at least one head and one value"):
        run(
            **(
                given((0, 5, 3), dim=1)
                | {"q": torch.ones(3, 2, 0), "k": torch.ones(1, 2, 9, 0), "v": torch.ones(1, 2, 9, 0)}
            )
        )
