"""The GPTQ file format as pure tensor conversions: codes, scales and zeros to and from int32 words.

As AutoGPTQ published it and GPTQModel, vLLM and ExLlama read it, for a linear ``[N, K]`` with G groups and
``per_word = 32 // bits`` codes an int32 (the first code in the lowest bits):

- ``qweight [ceil(K / per_word), N]`` int32: words run along K.
- ``qzeros [G, ceil(N / per_word)]`` int32: words run along N. Format v1 stores ``zero - 1``, v2 stores ``zero``.
- ``scales [G, N]`` float16.
- ``g_idx [K]`` int32: group of each column. ``k // group_size`` unless columns were quantized in activation order.

The weight is ``scales[g_idx[k], n] * (q[n, k] - zero[g_idx[k], n])``.

Letters: N out_features, K in_features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmopt.errors import InputError

BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized weight, columns in the order of the original: the caller's side of the conversion.

    ``q [N, K]`` uint8, ``scales [N, G]`` float16, ``zeros [N, G]`` uint8, ``g_idx [K]`` int32.
    """

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor


@dataclass(frozen=True, slots=True)
class GptqTensors:
    """A quantized weight as it lies in the file (shapes in the module's docstring)."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor


def words(count: int, bits: int) -> int:
    """int32 words that hold ``count`` codes."""
    return -(-count * bits // 32)


def shapes(out_features: int, in_features: int, groups: int, bits: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of one linear in the file."""
    return {
        "qweight": (words(in_features, bits), out_features),
        "qzeros": (groups, words(out_features, bits)),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
    }


def contiguous_groups(in_features: int, group_size: int) -> torch.Tensor:
    """``g_idx`` of a weight whose groups follow each other: ``k // group_size`` (-1: one group)."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features, dtype=torch.int32) // size


def pack(codes: Codes, *, bits: int, v2: bool = False) -> GptqTensors:
    """Codes to words.

    Format v1 has no word for a zero point of 0. Such a group is written mirrored, ``q -> top - q``, ``zero -> top``,
    ``scale -> -scale``, which stands for exactly the same weights. Format v2 (``checkpoint_format="gptq_v2"``) needs
    no such thing.

    Args:
        codes: the weight.
        bits: 4 or 8.
        v2: store zero points as they are, rather than minus one.

    Raises:
        InputError: ``bits`` is not 4 or 8.
    """
    _check_bits(bits)
    if not v2:
        codes = _without_zero_zeros(codes, top=2**bits - 1)
    stored = codes.zeros if v2 else codes.zeros - 1
    return GptqTensors(
        qweight=pack_weight(codes.q, bits=bits),
        qzeros=_to_words(stored.t().contiguous(), bits),
        scales=codes.scales.t().contiguous(),
        g_idx=codes.g_idx.to(torch.int32),
    )


def unpack(tensors: GptqTensors, *, bits: int, v2: bool = False) -> Codes:
    """Words to codes; N and K are taken from ``scales`` and ``g_idx``.

    In v1 one is added to each whole word, so that a zero point of 0 comes back where the writer subtracted from whole
    words and borrowed from the neighbour (GPTQModel does).
    """
    _check_bits(bits)
    n, k = tensors.scales.shape[1], tensors.g_idx.shape[0]
    return Codes(
        q=unpack_weight(tensors.qweight, k, bits=bits),
        scales=tensors.scales.t().contiguous(),
        zeros=unpack_zeros(tensors.qzeros, n, bits=bits, v2=v2),
        g_idx=tensors.g_idx,
    )


def pack_weight(q: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Codes ``[N, K]`` uint8 to ``qweight [W, N]``."""
    return _to_words(q, bits).t().contiguous()


def unpack_weight(qweight: torch.Tensor, in_features: int, *, bits: int) -> torch.Tensor:
    """``qweight [W, N]`` (any slice of columns) to codes ``[N, in_features]`` uint8."""
    return _from_words(qweight.t().contiguous(), in_features, bits)


def unpack_zeros(qzeros: torch.Tensor, out_features: int, *, bits: int, v2: bool = False) -> torch.Tensor:
    """``qzeros [G, W]`` to zero points ``[N, G]`` uint8."""
    if not v2:
        ones = 0x11111111 if bits == 4 else 0x01010101
        wide = (qzeros.to(torch.int64) + ones) & 0xFFFFFFFF
        qzeros = torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)
    return _from_words(qzeros.contiguous(), out_features, bits).t().contiguous()


def column_order(g_idx: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """Permutation that makes the groups follow each other, for true activation order (``desc_act``).

    Args:
        g_idx: ``[K]`` group of each column.
        group_size: columns of a group; only the last group may be short. -1: one group.

    Returns:
        ``perm [K]`` int64 with ``g_idx[perm] == k // group_size``, stable; None where columns are in order already.

    Raises:
        InputError: an index is out of range, or a group does not have ``group_size`` columns.
    """
    k = g_idx.shape[0]
    in_order = contiguous_groups(k, group_size)
    if torch.equal(g_idx.to(torch.int32), in_order):
        return None
    groups = int(in_order[-1]) + 1
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise InputError.argument("g_idx", expected=f"groups 0..{groups - 1}", got=low if low < 0 else high)
    perm = torch.argsort(g_idx.to(torch.int64), stable=True)
    if not torch.equal(g_idx[perm].to(torch.int32), in_order):
        counts = torch.bincount(g_idx.to(torch.int64), minlength=groups)
        wrong = int((counts != torch.bincount(in_order.to(torch.int64))).nonzero()[0])
        raise InputError.argument(
            "g_idx", expected=f"{group_size} columns a group", got=f"{int(counts[wrong])} in group {wrong}"
        )
    return perm


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise InputError.argument("bits", expected="4 or 8", got=bits)


def _without_zero_zeros(codes: Codes, *, top: int) -> Codes:
    flip = codes.zeros == 0
    if not bool(flip.any()):
        return codes
    return Codes(
        q=torch.where(flip[:, codes.g_idx.to(torch.int64)], top - codes.q, codes.q),
        scales=torch.where(flip, -codes.scales, codes.scales),
        zeros=torch.where(flip, torch.full_like(codes.zeros, top), codes.zeros),
        g_idx=codes.g_idx,
    )


def _to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``[R, C]`` uint8 codes to ``[R, words]`` int32."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, words(count, bits) * (32 // bits) - count))
    if bits == 4:
        padded = (padded[:, 0::2] & 15) | (padded[:, 1::2] << 4)
    # four bytes are one little-endian word; flat, because a view of a single row minds its strides
    return padded.flatten().view(torch.int32).reshape(rows, -1)


def _from_words(packed: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """``[R, words]`` int32 to ``[R, count]`` uint8 codes."""
    as_bytes = packed.flatten().view(torch.uint8).reshape(packed.shape[0], -1)
    if bits == 4:
        as_bytes = torch.stack([as_bytes & 15, as_bytes >> 4], -1).flatten(-2)
    return as_bytes[:, :count].contiguous()
