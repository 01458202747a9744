"""Every Triton kernel against its op's reference, interpreted: without a GPU, on the CPU's tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from placed import Unplaced

from benchmarks.gpu_check.ops import CPU_ONLY, tolerance
from llmopt.ops import SPECS, device
from llmopt.ops.fused_linear import Weight, fused_linear, reference
from llmopt.ops.fused_linear.spec import weight_data
from llmopt.ops.int4_linear.reference import sixteen_bit_tokens
from llmopt.ops.spec import Case, OpSpec

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is not 1")

# of an op's own work, value by value in numpy: what takes minutes
MOST_WORK = 4_000_000


def test_many_tokens_are_multiplied_by_the_dequantized_weight_and_swiglu_has_its_biases() -> None:
    g = torch.Generator().manual_seed(0)
    weights = [
        Weight(weight_data("int4", 48, 64, 32, g), 48, 64, 4, 32, bias=torch.randn(48, generator=g)) for _ in "gu"
    ]
    for tokens in (3, 300):
        x, out = torch.randn(tokens, 64, generator=g), torch.empty(tokens, 48)
        with torch.no_grad(), sixteen_bit_tokens(), device.interpreting():
            fused_linear(x, weights, out, mode="swiglu")
            expected = reference.fused_linear(x, weights, out, mode="swiglu")
        torch.testing.assert_close(out, expected, rtol=4e-3, atol=4e-3)


def cases() -> list[Any]:
    found = []
    for name, spec in SPECS.items():
        if name in CPU_ONLY:
            continue
        for case in spec.cases:
            if case.real or spec.flops(**spec.make_inputs(case, 0)) > MOST_WORK:
                continue
            for dtype in case.params.get("dtypes", spec.tolerance):
                found.append(pytest.param(spec, case, dtype, id=f"{name}-{case.name}-{str(dtype)[6:]}"))
    return found


@pytest.mark.parametrize(("spec", "case", "dtype"), cases())
def test_a_kernel_agrees_with_the_reference(spec: OpSpec, case: Case, dtype: torch.dtype, nan_memory: None) -> None:
    case = dataclasses.replace(case, params={**case.params, "dtype": dtype})
    inputs = spec.make_inputs(case, 1)
    with sixteen_bit_tokens():
        expected = spec.reference(**inputs)
    with torch.no_grad(), device.interpreting():
        got = spec.run(**inputs)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    rtol, atol = tolerance(spec, dtype, expected)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", sorted({*SPECS} - CPU_ONLY))
def test_an_op_makes_its_tensors_where_its_inputs_are(name: str) -> None:
    spec = SPECS[name]
    for case in [c for c in spec.cases if not c.real][:4]:
        inputs = spec.make_inputs(case, 1)
        if spec.flops(**inputs) > MOST_WORK:
            continue
        with torch.no_grad(), device.interpreting(), Unplaced() as mode:
            spec.run(**inputs)
            if spec.torch_arguments is not None:
                spec.torch_arguments(**inputs)
        assert mode.found == []


def test_blocks_chosen_by_time_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.ops import attention as op
    from llmopt.ops import device
    from llmopt.ops.attention import reference, triton_kernel

    monkeypatch.setattr(op, "MANY_QUERIES", 16)
    draw = torch.Generator().manual_seed(0)
    for config in triton_kernel._tuned.configs:
        monkeypatch.setattr(triton_kernel, "_fitting", lambda configs, named, **_: configs)
        monkeypatch.setattr(triton_kernel._tuned, "configs", [config])
        monkeypatch.setattr(triton_kernel._tuned, "early_config_prune", None)
        for queries, keys, dim, causal in ((70, 70, 64, True), (40, 200, 48, True), (33, 140, 64, False)):
            q = torch.randn(1, 4, queries, dim, generator=draw).half()
            k, v = (torch.randn(1, 2, keys, dim, generator=draw).half() for _ in "kv")
            with device.interpreting():
                got = op.attention(q, k, v, scale=0.2, causal=causal)
            expected = reference.attention(q, k, v, scale=0.2, causal=causal)
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "parts"), [("int4", 2), ("int4", 8), ("int8", 4), ("int8", 8), ("int4a", 2), ("int4a", 8)]
)
def test_a_tile_whose_inputs_are_split_is_put_together(kind: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.ops.fused_linear import triton_kernel

    asked: list[int] = []

    def split(blocks: int, k8s: int, step: int, device: torch.device) -> int:
        asked.append(blocks)
        return parts

    monkeypatch.setattr(triton_kernel, "_parts", split)
    g = torch.Generator().manual_seed(parts)
    weights = [
        Weight(weight_data(kind, 40, 1056, 32, g), 40, 1056, int(kind[3]), 32, asymmetric=kind.endswith("a"))
        for _ in "ab"
    ]
    for tokens, mode, width in ((1, "store", 80), (1, "swiglu", 40), (3, "add", 80), (8, "swiglu", 40)):
        x, out = torch.randn(tokens, 1056, generator=g), torch.randn(tokens, width, generator=g)
        with torch.no_grad(), sixteen_bit_tokens():
            expected = reference.fused_linear(x, weights, out.clone(), mode=mode)
            for _ in range(2):  # the counters are as they were
                got = out.clone()
                with device.interpreting():
                    fused_linear(x, weights, got, mode=mode)
                size = float(expected.abs().max())
                torch.testing.assert_close(got, expected, rtol=4e-3, atol=2e-3 * size)
    assert asked


def test_few_rows_are_split_and_many_are_not() -> None:
    from llmopt.ops.fused_linear.triton_kernel import _parts

    cpu = torch.device("cpu")  # taken for an H100 with 132 processors
    assert _parts(4096 // 16, 4096 // 8, 64, cpu) == 2
    assert _parts(4096 // 16, 12288 // 8, 64, cpu) == 4
    assert _parts(24576 // 16, 4096 // 8, 64, cpu) == 1
    assert _parts(16, 1024 // 8, 64, cpu) == 1
