"""pool_memory: the same tokens from memory that is planned once, alone and behind fuse_kernels; nothing left of it after."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes import PoolMemory
from llmopt.passes.base import PassContext
from llmopt.passes.pool_memory import cuda, weights
from llmopt.runtime.cache import KVCache
from llmopt.runtime.generate import Generation
from llmopt.stages import Stages

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
needs_kernels = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of small models are moved as well."""
    monkeypatch.setattr(weights, "SMALL_BYTES", 0)


def context(model: Any, *, timed: bool = False) -> PassContext:
    resolved = resolve_model(model)
    return PassContext(resolved, resolved.device, lambda event: None, prompt_tokens=16, timed=timed)


def generation_of(model: Any) -> Generation:
    found = model.generate.__self__
    assert isinstance(found, Generation)
    return found


@every_family
def test_the_models_own_layers_decode_the_same_tokens_from_a_cache_that_does_not_grow(
    family: str, tiny: Any, token_rows: Any, any_size: None
) -> None:
    model, ids = tiny(family, torch.float32), token_rows(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    patch = PoolMemory().apply(context(model)).patch
    patch.enable()
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected)
    cache = out.past_key_values
    assert isinstance(cache, KVCache)
    assert (cache.length, cache.capacity) == (20, 21)
    beams = {**GREEDY, "num_beams": 3}
    pooled = model.generate(ids, attention_mask=mask, **beams)
    patch.disable()
    assert torch.equal(pooled, model.generate(ids, attention_mask=mask, **beams))
    assert not isinstance(
        model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY).past_key_values, KVCache
    )


@every_family
def test_weights_lie_in_one_block_in_the_order_of_execution(family: str, tiny: Any, any_size: None) -> None:
    model = tiny(family, torch.bfloat16)
    given = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.clone() for name, p in given.items()}
    patch = PoolMemory().apply(context(model)).patch
    patch.enable()
    moved = list(model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in moved}) == 1
    addresses = [p.data_ptr() for p in moved]
    assert addresses == sorted(addresses)
    assert all(address % 64 == 0 for address in addresses)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, values[name])
    tied = resolve_model(model).tied
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    patch.disable()
    assert all(p is given[name] for name, p in model.named_parameters(remove_duplicate=False))


def test_small_models_and_those_who_ask_for_it_keep_their_weights_where_they_are(tiny: Any) -> None:
    model = tiny("qwen3", torch.bfloat16)
    for item in (PoolMemory(), PoolMemory(weights=False)):
        applied = item.apply(context(model))
        assert applied.details["weights_moved"] == 0
        assert "weights" not in applied.coverage.implementations


@needs_kernels
@every_family
def test_behind_fuse_kernels_buffers_and_caches_of_some_batch_sizes_are_kept(
    family: str, tiny: Any, token_rows: Any, any_size: None
) -> None:
    plain, model = tiny(family, torch.float32), tiny(family, torch.float32)
    llmopt.optimize(model, ["fuse_kernels", "pool_memory"], measure=False, calibration=token_rows(2, 32))
    generation = generation_of(model)
    engine = generation.engine()
    assert engine.pooled
    kept: dict[int, Any] = {}
    for turn in range(2):
        for sequences in (1, 3, 2):
            ids = token_rows(sequences, 9 + sequences, seed=sequences)
            mask = torch.ones_like(ids)
            expected = plain.generate(ids, attention_mask=mask, **GREEDY)
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
            step = generation._idle[-1]
            assert turn == 0 or kept[sequences] is step
            kept[sequences] = step
    assert len(engine._idle_work) == 1
    for sequences in (4, 5, 6):
        ids = token_rows(sequences, 9)
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert [step.cache.sequences for step in generation._idle] == [2, 4, 5, 6]
    llmopt.restore(model)
    assert not isinstance(getattr(model.generate, "__self__", None), Generation)
    assert not generation._idle


@needs_kernels
@pytest.mark.parametrize("least_bytes", [0, 1 << 40])
def test_every_subset_of_stages_gives_the_tokens_of_the_model(
    least_bytes: int, tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SMALL_BYTES", least_bytes)
    model, ids = tiny("qwen3", torch.float32), token_rows(1, 9)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    stages = Stages(model)
    patches = []
    for name in ("fuse_kernels", "compile_tvm", "pool_memory"):
        stages.show(patches)
        if name == "compile_tvm":
            pytest.importorskip("tvm")
        patches.append(llmopt.passes.PASSES[name]().apply(context(model)).patch)
    for subset in ([0, 1, 2], [2], [0, 2], [1, 2], [0, 1], [0, 1, 2], []):
        stages.show([patches[i] for i in subset])
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected), subset
        if subset and subset != [2]:
            assert generation_of(model).engine().pooled == (2 in subset and 0 in subset), subset


def test_the_receipt_has_what_was_counted(tiny: Any) -> None:
    model = tiny("qwen3", torch.float32)
    details = PoolMemory().apply(context(model, timed=True)).details
    for side in ("before", "after"):
        assert details[side]["first_token"] >= 0
        assert details[side]["steady_s"] > 0
        assert details[side]["worst_stall_s"] >= 0
    assert details["said"][0].startswith("page faults: first token ")
    assert "_prepare_cache_for_generation" not in vars(model)


# ---- CUDA's allocator, as a fake


@pytest.mark.parametrize(
    ("given", "reserved", "said", "calls"),
    [
        (None, 0, "allocator options set: expandable_segments:True", 1),
        (None, 5, "allocator options left alone: the process has allocated already", 0),
        ("max_split_size_mb:64", 0, "allocator options as the process was given them: max_split_size_mb:64", 0),
    ],
)
def test_allocator_options_are_set_only_while_they_can_be(
    given: str | None, reserved: int, said: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if given is None:
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    else:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory", SimpleNamespace(_set_allocator_settings=made.append))
    assert cuda.set_options(torch.device("cuda")).startswith(said)
    assert len(made) == calls
