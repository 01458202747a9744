"""Instruction sets: which is in force, what refuses one, and where two of them must give the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.env import ISA_NAMES
from llmopt.ops.int4_experts import int4_experts
from llmopt.ops.int4_experts.spec import make_inputs
from llmopt.ops.int4_linear import int4_linear, layout
from llmopt.ops.int8_linear import int8_linear
from llmopt.ops.spec import Case

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

# around one tile of 16 tokens, two of them, and a panel of weights that does not hold all rows
TOKENS = [15, 16, 17, 31, 32, 33, 50]
SIZES = [(1, 1), (16, 33), (17, 96), (37, 200), (96, 640)]


@pytest.fixture
def both(request: pytest.FixtureRequest) -> Any:
    """``both(run)``: what ``run()`` gives on AVX-512 and on AMX."""
    if "amx" not in request.config.llmopt_isas:  # type: ignore[attr-defined]
        pytest.skip("this processor has no amx")

    def results(run: Any) -> list[torch.Tensor]:
        found = []
        try:
            for name in ("avx512", "amx"):
                native.force_isa(name)
                found.append(run())
        finally:
            native.force_isa("auto")
        return found

    return results


def packed(n: int, k: int, group: int, bits: int, *, asymmetric: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(n * k)
    groups = -(-k // group)
    q = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    scales = (torch.randn(n, groups, generator=g) * 0.02).half()
    zeros = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8) if asymmetric else None
    return layout.pack(q, scales, zeros, group_size=group, bits=bits)


@pytest.mark.parametrize("group", layout.KERNEL_GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
def test_amx_gives_the_bits_of_avx512_int4_linear(asymmetric: bool, dtype: torch.dtype, group: int, both: Any) -> None:
    for n, k in SIZES:
        weight = packed(n, k, group, 4, asymmetric=asymmetric)
        for tokens in TOKENS:
            x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            bias = torch.linspace(-1, 1, n).to(dtype)
            expected, got = both(
                lambda x=x, w=weight, b=bias, n=n: int4_linear(
                    x, w, b, out_features=n, group_size=group, asymmetric=asymmetric
                )
            )
            assert torch.equal(got, expected), (n, k, tokens)


@pytest.mark.parametrize("group", layout.KERNEL_GROUPS)
def test_amx_gives_the_bits_of_avx512_int8_linear(group: int, both: Any) -> None:
    for n, k in SIZES:
        weight = packed(n, k, group, 8, asymmetric=False)
        for tokens in TOKENS:
            x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))
            expected, got = both(lambda x=x, w=weight, n=n: int8_linear(x, w, out_features=n, group_size=group))
            assert torch.equal(got, expected), (n, k, tokens)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
def test_amx_gives_the_bits_of_avx512_int4_experts(asymmetric: bool, both: Any) -> None:
    params = {"experts": 3, "top_k": 2, "hidden": 200, "intermediate": 72, "group": 64, "down_group": 32}
    for tokens in (20, 61):
        inputs = make_inputs(Case("own", params | {"tokens": tokens, "asymmetric": asymmetric}), 0)
        expected, got = both(lambda given=inputs: int4_experts(**given))
        assert torch.equal(got, expected), tokens


def test_weights_larger_than_a_panel_give_the_bits_of_avx512(both: Any) -> None:
    n, k = 160, 8192  # two panels of 512 KiB a thread and a part of one
    weight = packed(n, k, 128, 4, asymmetric=False)
    x = torch.randn(17, k, generator=torch.Generator().manual_seed(0))
    expected, got = both(lambda: int4_linear(x, weight, out_features=n, group_size=128))
    assert torch.equal(got, expected)


def test_forcing_an_isa_puts_it_in_force(isa: str) -> None:
    assert native.active_isa() == isa
    native.force_isa("auto")
    assert native.active_isa() == native.library().supported_isa()


def test_an_isa_the_machine_lacks_is_refused() -> None:
    best = str(native.library().supported_isa())
    for name in ISA_NAMES[ISA_NAMES.index(best) + 1 :]:
        with pytest.raises(ValueError, match=f"isa: this processor supports up to {best}, got '{name}'"):
            native.force_isa(name)
    with pytest.raises(ValueError, match=r"isa: expected auto \| portable \| avx2 \| avx512 \| amx, got 'avx3'"):
        native.force_isa("avx3")


def test_the_environment_variable_forces_an_isa(isa: str) -> None:
    code = "from llmopt import native; print(native.active_isa())"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LLMOPT_ISA": isa}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == isa
