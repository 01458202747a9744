"""The walk of quantize_gptq: its two paths through a block, what is put back after, and what blocks compute in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from llmopt.measure import environment
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes.base import Applied, PassContext
from llmopt.passes.quantize_gptq import QuantizeGptq, sequential

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WALKED = ["qwen3", "ernie4_5_moe", "deepseek_v3"]


def apply(model: Any, rows: torch.Tensor) -> Applied:
    ctx = PassContext(resolve_model(model), torch.device("cpu"), lambda event: None, calibration=list(rows))
    return QuantizeGptq(group_size=64).apply(ctx)


# ---- the two paths


def test_stand_ins_give_way_to_the_originals_whatever_happens() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = block
    other, another = nn.Identity(), nn.Identity()

    def work() -> None:
        with sequential.StandIns() as stand_ins:
            stand_ins.swap(block, "0", other)
            stand_ins.swap(block, "0", another)
            assert block[0] is another
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(block) == [first, second]


def test_what_is_remembered_computes_a_batch_once() -> None:
    calls, batch = [], 0

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor, *, mask: None) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(batch)
            return x + 1, x.new_ones(1000)

    remembered = sequential.Remembered(Attention(), lambda: batch)
    first = remembered(torch.zeros(2), mask=None)
    batch = 1
    assert remembered(torch.ones(2), mask=None)[0].tolist() == [2, 2]
    batch = 0
    assert remembered(torch.ones(2), mask=None) is first
    assert first[0].tolist() == [1, 1]
    assert first[1] is None
    assert calls == [0, 1]


def test_drift_is_shrunk_where_tokens_are_few() -> None:
    def drift(tokens: int) -> float:
        moments = sequential.Moments(50, torch.device("cpu"))
        moments.add(torch.ones(tokens, 50), 2 * torch.ones(tokens, 50))
        return float(moments.drift()[0, 0])

    assert [drift(n) for n in (0, 50, 4950)] == pytest.approx([0.0, 0.5, 0.99])


@pytest.mark.parametrize("family", WALKED)
@torch.no_grad()
def test_the_exact_path_is_the_model_as_it_was(
    family: str, tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny(family), token_rows(4, 48)
    walked: dict[nn.Module, torch.Tensor] = {}
    reaching = sequential.Paths.reaching

    def watched(self: sequential.Paths, parent: nn.Module, attr: str) -> Iterator[Any]:
        for given, exact in reaching(self, parent, attr):
            walked[getattr(parent, attr)] = exact[0]
            yield given, exact

    monkeypatch.setattr(sequential.Paths, "reaching", watched)
    apply(model, rows)
    layers = resolve_model(model).layers
    assert len(walked) == sum(len(layer.stages) + (layer.experts is not None) for layer in layers)
    expected: dict[nn.Module, torch.Tensor] = {}
    for module in walked:
        module.register_forward_pre_hook(lambda m, args: expected.__setitem__(m, args[0]))
    model(input_ids=rows, use_cache=False)
    assert expected.keys() == walked.keys()
    assert all(torch.equal(walked[module], expected[module]) for module in walked)


@pytest.mark.parametrize("family", WALKED)
def test_what_is_remembered_is_what_would_be_computed_again(
    family: str, tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(model: Any) -> dict[str, torch.Tensor]:
        apply(model, token_rows(4, 600)).patch.enable()
        return {name: b.clone() for name, b in model.named_buffers() if b.dtype == torch.uint8}

    remembered = packed(tiny(family))
    with monkeypatch.context() as patch:
        patch.setattr(sequential.Remembered, "forward", lambda self, *args, **named: self.module(*args, **named))
        again = packed(tiny(family))
    assert remembered.keys() == again.keys()
    assert all(torch.equal(remembered[name], again[name]) for name in again)


# ---- what blocks compute in


def test_blocks_compute_in_their_dtype_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str, *isa: str) -> list[torch.dtype]:
        monkeypatch.setattr(environment, "cpu", lambda: {"isa": list(isa)})
        return [sequential.computing_dtype(dtype, torch.device(device)) for dtype in DTYPES]

    single, bf16, _ = DTYPES
    assert on("cpu", "avx2") == [single] * 3
    assert on("cpu", "avx512_vnni", "avx512_bf16") == [single, bf16, single]
    assert on("cpu", "avx512_bf16", "avx512_fp16") == on("cuda") == DTYPES


@pytest.mark.parametrize("flags", [[], ["avx512_bf16"]], ids=["without", "with"])
@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES])
def test_float32_ends_with_the_run_of_a_block(
    family: str, flags: list[str], tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cpu", lambda: {"isa": flags})
    wanted = torch.bfloat16 if flags else torch.float32
    model, rows = tiny(family, torch.bfloat16), token_rows(4, 48)
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t.data_ptr(), t.dtype) for t in tensors]
    computed: set[torch.dtype] = set()
    layers = [layer.module for layer in resolve_model(model).layers]
    handles = [layer.register_forward_hook(lambda m, args, out: computed.add(args[0].dtype)) for layer in layers]
    applied = apply(model, rows)
    for handle in handles:
        handle.remove()
    assert computed == {wanted}
    assert applied.details["computed_in"] == str(wanted).removeprefix("torch.")
    assert [(t.data_ptr(), t.dtype) for t in tensors] == before


@pytest.mark.parametrize("method", ["add", "hessian"])
def test_an_interrupt_in_float32_gives_the_weights_back(
    method: str, tiny: Any, token_rows: Any, same_bits: Any, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: sequential.Moments, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "cpu", lambda: {"isa": []})
    monkeypatch.setattr(sequential.Moments, method, interrupt)
    model = tiny("deepseek_v3", torch.bfloat16)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        apply(model, token_rows(2, 24))
    assert same_bits(model.state_dict(), before)
