"""packed_tiles: the bytes of the reference, whatever the sizes; nothing around them; bad calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.int4_linear import layout
from llmopt.ops.packed_tiles import packed_nearest, packed_sums, packed_words, reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

# rows, columns, group: whole tiles and groups; tails of both, within a word too; one of each; several threads' worth
SIZES = [(32, 256, 128), (37, 200, 64), (16, 33, 32), (5, 7, 32), (1, 1, 128), (15, 129, 128), (1040, 512, 64)]


def random(n: int, k: int, group: int, bits: int, asymmetric: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(n + k)
    groups = -(-k // group)
    zeros = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=g) if asymmetric else None
    return {
        # whatever lies behind the last column of a word must not show
        "words": torch.randint(-(2**31), 2**31, (-(-k * bits // 32), n), generator=g).to(torch.int32),
        "scales": (torch.rand(n, groups, generator=g) + 0.01).to(torch.float16),
        "zeros": zeros,
    }


def empty(n: int, k: int, group: int, bits: int, asymmetric: bool) -> torch.Tensor:
    shape = layout.packed_shape(n, k, group, bits=bits, asymmetric=asymmetric)
    return torch.full(shape, 0xAA, dtype=torch.uint8)


FORMATS = pytest.mark.parametrize(
    ("bits", "asymmetric"), [(4, False), (4, True), (8, False)], ids=["int4", "int4_asym", "int8"]
)


@FORMATS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_words_give_the_bytes_of_the_reference(
    size: tuple[int, int, int], bits: int, asymmetric: bool, isa: str
) -> None:
    n, k, group = size
    given, out = random(n, k, group, bits, asymmetric), empty(n, k, group, bits, asymmetric)
    packed_words(**given, out=out, in_features=k, group_size=group, bits=bits)
    assert torch.equal(out, reference.packed_words(**given, in_features=k, group_size=group, bits=bits))


COMPILED = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])


@FORMATS
@COMPILED
def test_a_weight_is_packed_part_by_part(
    monkeypatch: pytest.MonkeyPatch, bits: int, asymmetric: bool, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    n, k, group = 100, 200, 64
    given, out, whole = random(n, k, group, bits, asymmetric), *(empty(n, k, group, bits, asymmetric) for _ in "ab")
    del given["words"]
    given["weight"] = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 2**bits
    packed_nearest(**given, out=whole, group_size=group, bits=bits)
    for rows in (slice(32, 96), slice(0, 32), slice(96, 100)):
        part = {name: None if x is None else x[rows] for name, x in given.items()}
        packed_nearest(**part, out=out, group_size=group, bits=bits, first_tile=rows.start // 16)
    assert torch.equal(out, whole)


@pytest.mark.parametrize(("rows", "first_tile"), [(32, -1), (32, 6), (20, 2), (100, 1)])
@COMPILED
def test_parts_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, rows: int, first_tile: int, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    given, out = random(rows, 200, 64, 8, False), empty(100, 200, 64, 8, False)
    with pytest.raises(InputError, match="first_tile"):
        packed_nearest(torch.randn(rows, 200), given["scales"], None, out, group_size=64, bits=8, first_tile=first_tile)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nearest_codes_are_those_of_the_reference(
    size: tuple[int, int, int], dtype: torch.dtype, bits: int, asymmetric: bool, isa: str
) -> None:
    n, k, group = size
    given, out = random(n, k, group, bits, asymmetric), empty(n, k, group, bits, asymmetric)
    del given["words"]
    # far beyond both ends of the range as well
    given["weight"] = (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 2**bits).to(dtype)
    packed_nearest(**given, out=out, group_size=group, bits=bits)
    assert torch.equal(out, reference.packed_nearest(**given, group_size=group, bits=bits))


@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-24], ids=["one", "negative", "subnormal"])
def test_ties_go_to_the_even_code(scale: float) -> None:
    weight = (torch.arange(-32, 32) / 4 * scale).expand(16, 64).contiguous()
    scales, out = torch.full((16, 1), scale, dtype=torch.float16), empty(16, 64, 64, 4, False)
    packed_nearest(weight, scales, None, out, group_size=64, bits=4)
    codes, _, _ = layout.unpack(out, out_features=16, in_features=64, group_size=64, bits=4, asymmetric=False)
    expected = (torch.arange(-32, 32) / 4 + 8).round().clamp(0, 15)
    assert torch.equal(codes, expected.to(torch.uint8).expand(16, 64))


def test_rows_may_be_a_part_of_something_larger() -> None:
    given = random(64, 256, 64, 4, False)
    part = {"words": given["words"][:, 16:48], "scales": given["scales"][16:48].contiguous(), "zeros": None}
    out = empty(32, 256, 64, 4, False)
    packed_words(**part, out=out, in_features=256, group_size=64, bits=4)
    assert torch.equal(out, reference.packed_words(**part, in_features=256, group_size=64, bits=4))
    wide = torch.randn(32, 300)
    packed_nearest(wide[:, 20:276], part["scales"], None, out, group_size=64, bits=4)
    expected = reference.packed_nearest(wide[:, 20:276], part["scales"], None, group_size=64, bits=4)
    assert torch.equal(out, expected)


def test_nothing_is_written_around_the_output() -> None:
    given = random(37, 200, 64, 4, True)
    tiles, nbytes = layout.packed_shape(37, 200, 64, bits=4, asymmetric=True)
    buffer = torch.full((tiles + 2, nbytes), 0xAA, dtype=torch.uint8)
    packed_words(**given, out=buffer[1:-1], in_features=200, group_size=64, bits=4)
    assert torch.equal(buffer[1:-1], reference.packed_words(**given, in_features=200, group_size=64, bits=4))
    assert (buffer[0] == 0xAA).all()
    assert (buffer[-1] == 0xAA).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [(0, 0), (36, 199)], ids=["first", "last"])
@COMPILED
def test_a_weight_that_is_no_number(
    monkeypatch: pytest.MonkeyPatch, bad: float, place: tuple[int, int], compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    given = random(37, 200, 64, 8, False)
    weight = torch.randn(37, 200)
    weight[place] = bad
    with pytest.raises(InputError, match="weight: expected finite values, got NaN or Inf"):
        packed_nearest(weight, given["scales"], None, empty(37, 200, 64, 8, False), group_size=64, bits=8)


def test_without_compiled_kernels_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    given, out = random(37, 200, 64, 4, True), empty(37, 200, 64, 4, True)
    packed_words(**given, out=out, in_features=200, group_size=64, bits=4)
    assert torch.equal(out, reference.packed_words(**given, in_features=200, group_size=64, bits=4))
    out.fill_(0xAA)
    weight = torch.randn(37, 200)
    packed_nearest(weight, given["scales"], given["zeros"], out, group_size=64, bits=4)
    expected = reference.packed_nearest(weight, given["scales"], given["zeros"], group_size=64, bits=4)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": torch.zeros(25, 37)}, "words: expected dtype int32"),
        ({"words": torch.zeros(24, 37, dtype=torch.int32)}, r"words: expected shape \[25, \*\]"),
        ({"words": torch.zeros(25, 36, dtype=torch.int32)}, "scales: expected shape"),
        ({"words": torch.zeros(37, 25, dtype=torch.int32).t()}, "words: expected a dense last dimension"),
        ({"scales": torch.ones(37, 3, dtype=torch.float16)}, "scales: expected shape"),
        ({"scales": torch.ones(37, 4)}, "scales: expected dtype float16"),
        ({"zeros": torch.zeros(37, 3, dtype=torch.uint8)}, "zeros: expected shape"),
        ({"zeros": None}, "out: expected shape"),
        ({"out": torch.zeros(3, 100, dtype=torch.uint8)}, "out: expected shape"),
        ({"out": torch.zeros(3, 100)}, "out: expected dtype uint8"),
        ({"group_size": 48}, "group_size: expected 32, 64 or 128, got 48"),
        ({"bits": 5}, "bits: expected 4 or 8, got 5"),
        ({"in_features": 0}, "at least one row and column"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_bad_calls(change: dict[str, Any], message: str) -> None:
    good = {
        **random(37, 200, 64, 4, True), "out": empty(37, 200, 64, 4, True), "in_features": 200, "group_size": 64,
        "bits": 4,
    }  # fmt: skip
    packed_words(**good)
    with pytest.raises(InputError, match=message):
        packed_words(**{**good, **change})


def test_bad_weights() -> None:
    given, out = random(37, 200, 64, 4, False), empty(37, 200, 64, 4, False)
    for weight, message in (
        (torch.zeros(37, 200, dtype=torch.float64), "weight: expected dtype"),
        (torch.zeros(200), "weight: expected shape"),
        (torch.zeros(36, 200), "scales: expected shape"),
        (torch.zeros(200, 37).t(), "weight: expected a dense last dimension"),
    ):
        with pytest.raises(InputError, match=message):
            packed_nearest(weight, given["scales"], None, out, group_size=64, bits=4)


def sums_of(tiles: torch.Tensor, k: int, group: int, bits: int) -> torch.Tensor:
    first = layout.planes(tiles, in_features=k, group_size=group, bits=bits, asymmetric=False)[0]
    lines, _ = layout.group_parts(first, in_features=k, group_size=group, asymmetric=False)
    return lines[..., 32:]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group"), SIZES)
def test_sums_follow_the_codes(n: int, k: int, group: int, bits: int, isa: str) -> None:
    given = random(n, k, group, bits, False)
    expected = empty(n, k, group, bits, False)
    packed_words(**given, out=expected, in_features=k, group_size=group, bits=bits)
    tiles = expected.clone()
    sums_of(tiles, k, group, bits).fill_(0xA5)
    assert not torch.equal(tiles, expected)
    packed_sums(tiles, in_features=k, group_size=group, bits=bits)
    assert torch.equal(tiles, expected)
    got = reference.packed_sums(expected, in_features=k, group_size=group, bits=bits)
    assert torch.equal(*(sums_of(x, k, group, bits) for x in (got, expected)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size: expected 32, 64 or 128, got 0"),
        ({"bits": 5}, "bits: expected 4 or 8, got 5"),
        ({"in_features": 0}, "at least one row and column"),
        ({"in_features": 900}, "tiles: expected shape"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_bad_sums(change: dict[str, Any], message: str) -> None:
    good = {"tiles": empty(37, 200, 64, 4, False), "in_features": 200, "group_size": 64, "bits": 4}
    with pytest.raises(InputError, match=message):
        packed_sums(**{**good, **change})


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_are_taken_and_put_back(bits: int, asymmetric: bool) -> None:
    n, k, group = 100, 200, 64
    given, whole = random(n, k, group, bits, asymmetric), empty(n, k, group, bits, asymmetric)
    packed_words(**given, out=whole, in_features=k, group_size=group, bits=bits)
    size: dict[str, Any] = {"in_features": k, "group_size": group, "bits": bits, "asymmetric": asymmetric}
    q, scales, zeros = layout.unpack(whole, out_features=n, **size)
    tiles, rows = slice(2, 4), slice(32, 64)
    taken = layout.take_tiles(whole, tiles, **size)
    expected = layout.pack(q[rows], scales[rows], None if zeros is None else zeros[rows], group_size=group, bits=bits)
    assert torch.equal(taken, expected)
    changed = whole.clone()
    layout.put_tiles(changed, tiles, torch.zeros_like(taken), **size)
    assert not torch.equal(changed, whole)
    layout.put_tiles(changed, tiles, taken, **size)
    assert torch.equal(changed, whole)
