"""Random codes of published shapes: packed bytes like any others."""

from __future__ import annotations

import pytest
import torch

from llmopt.arena import WeightArena
from llmopt.ops.int4_linear import layout
from llmopt.passes.quantize_gptq.direct import RandomCodes


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [256, 320])  # an even number of groups is padded to an odd number of lines
def test_random_codes_are_what_packing_them_gives(
    k: int, bits: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr("llmopt.native.available", lambda: False)
    rows = 40 if kernels else 16 * 64 + 40
    packed = RandomCodes(0.02, 0, WeightArena(0)).packed("linear", rows, k, 64, bits=bits)
    whole = -(-rows // 16) * 16
    q, scales, _ = layout.unpack(
        packed, out_features=whole, in_features=k, group_size=64, bits=bits, asymmetric=False
    )  # fmt: skip
    assert torch.equal(packed, layout.pack(q, scales, None, group_size=64, bits=bits))
