"""The file format against numbers worked out by hand, against loops, and against itself."""

from __future__ import annotations

import pytest
import torch
from checkpoint_tools import pack_by_hand

from llmopt.checkpoint import gptq_format as fmt
from llmopt.checkpoint.gptq_format import Codes
from llmopt.errors import InputError

SHAPES = [(8, 32, 32), (16, 128, 64), (24, 96, -1), (7, 45, 32), (1, 8, 32), (9, 200, 128)]


def random_codes(n: int, k: int, group_size: int, *, bits: int, low_zero: int = 0, seed: int = 0) -> Codes:
    random = torch.Generator().manual_seed(seed)
    g_idx = fmt.contiguous_groups(k, group_size)
    groups = int(g_idx[-1]) + 1
    return Codes(
        q=torch.randint(0, 2**bits, (n, k), generator=random, dtype=torch.uint8),
        scales=torch.randn(n, groups, generator=random).half() + 2,
        zeros=torch.randint(low_zero, 2**bits, (n, groups), generator=random, dtype=torch.uint8),
        g_idx=g_idx,
    )


def weights(codes: Codes) -> torch.Tensor:
    group = codes.g_idx.long()
    return codes.scales.float()[:, group] * (codes.q.float() - codes.zeros.float()[:, group])


def test_golden_words() -> None:
    """Two rows, eight columns, one group. Row 0 is the codes 1..8: 0x87654321, first code in the lowest four bits.

    Zeros 8 and 3 of the two rows share a word along N: v2 stores 0x38, v1 one less each, 0x27.
    """
    q = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [15, 0, 15, 0, 0, 0, 0, 1]], dtype=torch.uint8)
    codes = Codes(
        q, torch.tensor([[0.5], [0.25]]).half(), torch.tensor([[8], [3]], dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int32),
    )  # fmt: skip
    v1, v2 = fmt.pack(codes, bits=4), fmt.pack(codes, bits=4, v2=True)
    assert v1.qweight.tolist() == [[0x87654321 - 2**32, 0x10000F0F]]
    assert torch.equal(v2.qweight, v1.qweight)
    assert v1.qzeros.tolist() == [[0x27]]
    assert v2.qzeros.tolist() == [[0x38]]
    assert v1.scales.tolist() == [[0.5, 0.25]]
    assert v1.g_idx.tolist() == [0] * 8
    assert [t.dtype for t in (v1.qweight, v1.qzeros, v1.scales, v1.g_idx)] == [
        torch.int32, torch.int32, torch.float16, torch.int32
    ]  # fmt: skip


def test_golden_words_8_bit() -> None:
    codes = Codes(
        torch.tensor([[0x01, 0x23, 0x45, 0x67, 0xFF]], dtype=torch.uint8), torch.ones(1, 1).half(),
        torch.tensor([[128]], dtype=torch.uint8), torch.zeros(5, dtype=torch.int32),
    )  # fmt: skip
    packed = fmt.pack(codes, bits=8)
    assert packed.qweight.tolist() == [[0x67452301], [0xFF]]
    assert packed.qzeros.tolist() == [[127]]


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_round_trip(n: int, k: int, group_size: int, bits: int, v2: bool) -> None:
    for seed in range(5):
        codes = random_codes(n, k, group_size, bits=bits, low_zero=0 if v2 else 1, seed=seed)
        packed = fmt.pack(codes, bits=bits, v2=v2)
        groups = codes.scales.shape[1]
        assert {f: tuple(getattr(packed, f).shape) for f in ("qweight", "qzeros", "scales", "g_idx")} == fmt.shapes(
            n, k, groups, bits
        )
        back = fmt.unpack(packed, bits=bits, v2=v2)
        for part in ("q", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(back, part), getattr(codes, part)), part


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_against_loops(n: int, k: int, group_size: int, bits: int, v2: bool) -> None:
    codes = random_codes(n, k, group_size, bits=bits, low_zero=0 if v2 else 1)
    packed = fmt.pack(codes, bits=bits, v2=v2)
    qweight, qzeros = pack_by_hand(codes.q.numpy(), codes.zeros.numpy(), bits, v2=v2)
    assert torch.equal(packed.qweight, torch.from_numpy(qweight))
    # words that the rows do not fill: ours hold zeros, GPTQModel's what is left of its subtraction
    used = n * bits // 32
    assert torch.equal(packed.qzeros[:, :used], torch.from_numpy(qzeros)[:, :used])
    theirs = fmt.unpack_zeros(torch.from_numpy(qzeros), n, bits=bits, v2=v2)
    assert torch.equal(theirs, codes.zeros)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_point_of_zero_in_v1(bits: int) -> None:
    """v1 cannot say 0. We mirror the group; GPTQModel borrows across the word. Both must be read as the same weights."""
    codes = random_codes(16, 64, 32, bits=bits, seed=3)
    codes.zeros[::3] = 0
    packed = fmt.pack(codes, bits=bits)
    back = fmt.unpack(packed, bits=bits)
    assert torch.equal(weights(back), weights(codes))
    assert int(back.zeros.min()) >= 1
    # every stored code is zero - 1, as readers that go code by code expect
    per_word, mask = 32 // bits, 2**bits - 1
    stored = torch.stack([(packed.qzeros >> (bits * i)) & mask for i in range(per_word)], -1).flatten(1)[:, :16]
    assert torch.equal(stored.t() + 1, back.zeros.int())
    _, borrowed = pack_by_hand(codes.q.numpy(), codes.zeros.numpy(), bits, v2=False)
    assert torch.equal(fmt.unpack_zeros(torch.from_numpy(borrowed), 16, bits=bits), codes.zeros)


def test_any_group_order_survives() -> None:
    codes = random_codes(8, 128, 32, bits=4, low_zero=1)
    shuffled = Codes(codes.q, codes.scales, codes.zeros, codes.g_idx[torch.randperm(128)])
    back = fmt.unpack(fmt.pack(shuffled, bits=4), bits=4)
    assert torch.equal(weights(back), weights(shuffled))


def test_slices_of_columns_unpack_alone() -> None:
    codes = random_codes(32, 64, 32, bits=4, low_zero=1)
    qweight = fmt.pack(codes, bits=4).qweight
    assert torch.equal(fmt.unpack_weight(qweight[:, 5:20], 64, bits=4), codes.q[5:20])


@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (100, 32), (64, -1), (64, 128)])
def test_column_order(k: int, group_size: int) -> None:
    in_order = fmt.contiguous_groups(k, group_size)
    assert fmt.column_order(in_order, group_size) is None
    assert fmt.column_order(in_order.long(), group_size) is None
    g_idx = in_order[torch.randperm(k, generator=torch.Generator().manual_seed(5))]
    perm = fmt.column_order(g_idx, group_size)
    if int(in_order[-1]) == 0:
        assert perm is None
        return
    assert perm is not None
    assert torch.equal(g_idx[perm], in_order)
    # stable: columns of a group keep their order
    for group in range(int(in_order[-1]) + 1):
        members = perm[in_order == group]
        assert torch.equal(members, members.sort().values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.index_fill_(0, torch.tensor([3]), 4), r"groups 0\.\.3, got 4"),
        (lambda g: g.index_fill_(0, torch.tensor([3]), -1), r"groups 0\.\.3, got -1"),
        (lambda g: g.index_fill_(0, torch.tensor([3]), 1), r"32 columns a group, got '31 in group 0'"),
    ],
    ids=["too high", "negative", "unequal groups"],
)
def test_bad_group_indices(change: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fmt.column_order(change(fmt.contiguous_groups(128, 32)), 32)  # type: ignore[operator]


@pytest.mark.parametrize("bits", [2, 3, 5, 16])
def test_other_bits_are_refused(bits: int) -> None:
    codes = random_codes(8, 32, 32, bits=4)
    with pytest.raises(InputError, match="bits: expected 4 or 8"):
        fmt.pack(codes, bits=bits)
