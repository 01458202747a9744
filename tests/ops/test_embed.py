"""embed: every value of a dtype, what is written, bad calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.embed import embed
from llmopt.ops.fused_linear import Weight
from llmopt.ops.fused_linear.spec import bits_of, weight_data

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


def table(kind: str = "int8", rows: int = 37, cols: int = 100, group: int = 64) -> Weight:
    data = weight_data(kind, rows, cols, group, torch.Generator().manual_seed(1))
    return Weight(data, rows, cols, bits_of(kind), group)


def looked_up(ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    out = torch.full((len(ids), weight.cols), torch.nan)
    embed(ids, weight, out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_value_of_a_half_is_what_torch_makes_of_it(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(256, 256)
    data = bits.view(dtype)
    got = looked_up(torch.arange(256), Weight(data, 256, 256, 16))
    numbers = ~data.isnan()
    # bit by bit: zeros have signs
    assert torch.equal(got.view(torch.int32)[numbers], data.float().view(torch.int32)[numbers])
    assert got[~numbers].isnan().all()


@pytest.mark.parametrize("kind", ["int4", "int8", "f32", "bf16", "f16"])
def test_a_token_alone_gives_what_it_gives_in_a_batch(kind: str, isa: str) -> None:
    ids = torch.randint(0, 37, (64,), generator=torch.Generator().manual_seed(0))
    whole = looked_up(ids, table(kind))
    assert torch.equal(torch.cat([looked_up(ids[t : t + 1], table(kind)) for t in range(64)]), whole)


@pytest.mark.parametrize("kind", ["int4", "int8", "f32", "bf16", "f16"])
def test_nothing_is_written_around_the_output(kind: str, isa: str) -> None:
    ids = torch.tensor([36, 0, 5])
    buffer = torch.full((5, 113), 777.0)
    out = buffer[1:-1, 3:103]
    embed(ids, table(kind), out)
    assert torch.equal(out, looked_up(ids, table(kind)))
    out.fill_(777.0)
    assert (buffer == 777.0).all()


def test_a_bad_value_reaches_its_row_only(isa: str) -> None:
    weight = table("f32")
    weight.data[5, 7] = torch.nan
    weight.data[6, 8] = torch.inf
    got = looked_up(torch.tensor([4, 5, 6]), weight)
    assert torch.equal(got.isfinite().all(1), torch.tensor([True, False, False]))
    assert got[1, 7].isnan()
    assert got[2, 8] == torch.inf


@pytest.mark.parametrize("kind", ["int8", "f32"])
@pytest.mark.parametrize("wrong", [37, -1, 2**40], ids=["one_too_many", "negative", "huge"])
def test_an_id_outside_the_table_is_an_index_error(wrong: int, kind: str) -> None:
    out = torch.full((3, 100), 777.0)
    with pytest.raises(IndexError, match=rf"ids: expected values in \[0, 37\), got {wrong}"):
        embed(torch.tensor([1, 2, wrong]), table(kind), out)
    assert (out == 777.0).all()


IDS = torch.tensor([1, 2, 3])
PACKED, PLAIN = table("int8"), table("f32")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ids_2d": ({"ids": IDS[None]}, r"ids: expected shape \[\*\], got \[1, 3\]"),
    "ids_int32": ({"ids": IDS.int()}, "ids: expected dtype int64"),
    "ids_float": ({"ids": IDS.float()}, "ids: expected dtype int64"),
    "ids_strided": ({"ids": torch.ones(6, dtype=torch.int64)[::2]}, "ids: expected a dense last dimension, got stride 2"),
    "asymmetric": ({"table": replace(PACKED, asymmetric=True)}, "table: expected symmetric, got 'asymmetric'"),
    "bits": ({"table": replace(PACKED, bits=3)}, "bits: expected 4, 8, 16 or 32, got 3"),
    "group_size": ({"table": replace(PACKED, group_size=48)}, "group_size: expected 32, 64 or 128, got 48"),
    "packed_rows": ({"table": replace(PACKED, rows=49)}, "table: expected shape"),
    "packed_int8": ({"table": replace(PACKED, data=PACKED.data.view(torch.int8))}, "table: expected dtype uint8"),
    "plain_rows": ({"table": replace(PLAIN, rows=38)}, r"table: expected shape \[38, 100\], got \[37, 100\]"),
    "rows_minus": ({"table": replace(PLAIN, rows=-1)}, "rows: expected at least 1, got -1"),
    "plain_strided": ({"table": replace(PLAIN, data=torch.ones(100, 37).T)}, "table: expected a"),
    "plain_double": ({"table": replace(PLAIN, data=PLAIN.data.double())}, "table: expected dtype float32, bfloat16"),
    "out_short": ({"out": torch.zeros(2, 100)}, r"out: expected shape \[3, \*\], got \[2, 100\]"),
    "out_narrow": ({"out": torch.zeros(3, 99)}, "out: expected the table's 100 columns, got 99"),
    "out_1d": ({"out": torch.zeros(3)}, r"out: expected shape \[3, \*\], got \[3\]"),
    "out_half": ({"out": torch.zeros(3, 100).half()}, "out: expected dtype float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_the_argument_and_write_nothing(name: str) -> None:
    change, message = BAD[name]
    arguments: dict[str, Any] = {"ids": IDS, "table": PACKED, "out": torch.zeros(3, 100), **change}
    with pytest.raises(InputError, match=f"^embed: {message}"):
        embed(**arguments)
    assert not arguments["out"].any()
