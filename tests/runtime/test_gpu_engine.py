"""The engine on a GPU, without one: ops by Triton's interpreter, tensors' devices by another one, the graph by a fake."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llmopt
from llmopt.models import FAMILIES, resolve_model
from llmopt.ops import device, next_token
from llmopt.runtime import engine as engine_module
from llmopt.runtime import latent, moe
from llmopt.runtime.engine import Engine
from llmopt.runtime.latent import LatentBlock
from llmopt.runtime.rows import Rows
from llmopt.runtime.sampling import Settings
from llmopt.runtime.step import DecodeStep

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is not 1")

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def interpreted() -> Iterator[None]:
    with torch.no_grad(), device.interpreting():
        yield


def logits_of(model: Any, ids: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits after the prompt and after each further token, prefilled and then decoded: ``[B, 1 + tokens, V]``."""
    engine = Engine(resolve_model(model))
    cache = engine.new_cache(len(ids), ids.shape[1] + tokens.shape[1] + 2)
    found = [engine.prefill(ids, mask, cache)]
    step = DecodeStep(engine, cache)
    step.start(cache.length - cache.start)
    for token in tokens.T:
        step.ids.copy_(token)
        step.run()
        cache.length += 1
        found.append(step.logits.clone())
    return torch.stack(found, 1)


@every_family
def test_prefill_and_decode_agree_with_the_model(family: str, tiny: Any, token_rows: Any, interpreted: None) -> None:
    model = tiny(family, torch.float32)
    ids, tokens = token_rows(2, 11), token_rows(2, 3, seed=4)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    got = logits_of(model, ids, tokens, mask)
    whole, seen = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    with mock.patch.object(device, "_interpreting", False):
        expected = model(whole, attention_mask=seen, position_ids=positions).logits[:, 10:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@every_family
def test_int4_logits_agree_with_the_dequantized_model(family: str, tiny: Any, token_rows: Any) -> None:
    model = tiny(family, torch.float32)
    llmopt.optimize(model, ["quantize_gptq"], calibration=token_rows(2, 32), measure=False)
    # one further token: interpreted, each costs seconds
    ids, tokens = token_rows(1, 9), token_rows(1, 1, seed=4)
    # each weight dequantized: what the ops stand for, with activations as they are
    with torch.no_grad(), mock.patch("llmopt.packed.uses_kernels", return_value=False):
        expected = model(torch.cat([ids, tokens], 1)).logits[:, 8:]
    with torch.no_grad(), device.interpreting():
        got = logits_of(model, ids, tokens, torch.ones_like(ids))
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    assert cosine.min() > 0.999, cosine


@every_family
def test_generate_gives_the_tokens_of_the_model(family: str, fused: Any, token_rows: Any) -> None:
    plain, model = fused(family)
    ids = token_rows(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = plain.generate(ids, attention_mask=mask, **GREEDY)
    engine = model.generate.__self__
    engine.changed()
    with device.interpreting():
        found = model.generate(ids, attention_mask=mask, **GREEDY)
    engine.changed()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.2}], ids=str
)
def test_drawn_tokens_are_the_cpus(options: dict[str, Any], fused: Any, token_rows: Any) -> None:
    plain, model = fused("qwen3")
    ids = token_rows(2, 7)
    asked = {**GREEDY, "do_sample": True, "attention_mask": torch.ones_like(ids), **options}
    torch.manual_seed(2)
    expected = plain.generate(ids, **asked)
    engine = model.generate.__self__
    engine.changed()
    torch.manual_seed(2)
    with device.interpreting():
        found = model.generate(ids, **asked)
    engine.changed()
    assert torch.equal(found, expected)


class OneDevice(TorchDispatchMode):
    """Refuses an operation whose tensors lie on several devices, and one that makes a tensor on another than ``wanted``."""

    def __init__(self, wanted: str) -> None:
        super().__init__()
        self.wanted = wanted
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                self.seen += 1
                assert x.device.type == self.wanted, f"{func}: a tensor {list(x.shape)} on {x.device}"
        return out


@pytest.mark.parametrize("weights", ["float", "int4"])
@every_family
def test_every_tensor_of_a_step_is_on_the_models_device(
    family: str, weights: str, tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, torch.bfloat16)
    if weights == "int4":
        llmopt.optimize(model, ["quantize_gptq"], calibration=token_rows(2, 32), measure=False)
    resolved = resolve_model(model)
    # packed on the CPU, once, and moved: looks at values
    halves = {
        id(a._module.kv_b_proj): a.halves() for a, _ in Engine(resolved).layers if isinstance(a, LatentBlock)
    }  # fmt: skip
    monkeypatch.setattr(Rows, "longest_run", lambda self: 5)
    moved = {key: tuple(t.to("meta") for t in pair) for key, pair in halves.items()}
    monkeypatch.setattr(latent, "_halves_of", lambda kv_b, heads, nope: moved[id(kv_b)])
    for module in (next_token, engine_module, moe):
        monkeypatch.setattr(module, "by_triton", lambda tensor: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model.to("meta")
    with OneDevice("meta") as mode, torch.no_grad():
        engine = Engine(resolve_model(model))
        cache = engine.new_cache(2, 16)
        rows = Rows.of_batch(2, 5, 0, None, None, engine.device)
        ids = torch.zeros(10, dtype=torch.int64, device="meta")
        h = torch.empty(10, engine.hidden_size, device="meta")
        engine.embed(ids, h)
        engine.hidden(h, rows, cache, 5)
        monkeypatch.setattr(engine_module, "recorded", lambda step, graphs: step.make_calls())
        DecodeStep(engine, cache).choose_by(settings=Settings(top_k=5))
    assert mode.seen > 100


class FakeGraph:
    """Stands in for torch's: keeps what is captured under it, and makes it again at a replay."""

    captured: Any = None

    def replay(self) -> None:
        self.captured()


def test_a_graph_is_captured_behind_the_filled_slots_and_leaves_all_as_it_was(
    tiny: Any, token_rows: Any, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from llmopt.runtime import program

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, capture_error_mode: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    engine = Engine(resolve_model(tiny("qwen3", torch.float32)))
    ids = token_rows(2, 6)
    cache = engine.new_cache(2, 24)
    for tensor in cache.tensors():
        tensor.zero_()  # what lay there may be NaN, which equals nothing
    engine.prefill(ids, torch.ones_like(ids), cache)
    step = DecodeStep(engine, cache)
    step.start(cache.length - cache.start)
    step.ids.copy_(ids[:, 0])
    before = [t.clone() for t in (step.ids, step.rows.position, step.rows.slot)]
    filled = [t[:, :, :20].clone() for t in cache.tensors()]
    ran: list[list[int]] = []
    calls = step.make_calls

    def counted() -> object:
        ran.append((step.rows.slot + 1).tolist())
        # a capture runs nothing
        return calls() if len(ran) <= 2 else None

    with mock.patch.object(step, "make_calls", counted):
        made = program.GraphProgram(step, program.GraphMemory())
    assert all(torch.equal(a, b) for a, b in zip(before, (step.ids, step.rows.position, step.rows.slot), strict=True))
    # the last of 24, where nothing that is filled is
    assert ran[:2] == [[23, 23], [23, 23]]
    assert all(torch.equal(a, t[:, :, :20]) for a, t in zip(filled, cache.tensors(), strict=True))
    monkeypatch.setattr(FakeGraph, "captured", calls)
    made.run(2)
    assert step.rows.slot.tolist() == [7, 7]


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.runtime.pools import GraphMemory

    handles = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    memory, first, second = GraphMemory(), FakeGraph(), FakeGraph()
    for graph in (first, second):
        assert memory.pool() == 0
        memory.lives(graph)
    del first, graph
    assert memory.pool() == 0
    del second
    assert memory.pool() == 1


def test_a_pooled_cache_has_a_pool_of_its_own_and_a_plain_one_none(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from llmopt.runtime import pools

    taken: list[Any] = []

    @contextmanager
    def use(pool: Any, device: Any) -> Iterator[None]:
        taken.append((pool, device))
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(pools.CAPTURING.acquire, blocking=False).result(), "a capture may begin meanwhile"
        yield

    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    resolved = resolve_model(tiny("qwen3", torch.float32))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(engine_module, "pool_of_its_own", lambda device: pools.pool_of_its_own(gpu))
    for pooled in (False, True, True):
        Engine(resolved, pooled=pooled).new_cache(1, 8)
    assert [device for _, device in taken] == [gpu, gpu]
    assert taken[0][0] is not taken[1][0]
    with pools.pool_of_its_own(torch.device("cpu")):
        assert len(taken) == 2
    # as a capture that failed leaves torch, a pool's end would be the process's
    monkeypatch.setattr(pools._Captures, "failed", False)
    with pytest.raises(RuntimeError, match="capture"), pools.capturing():
        raise RuntimeError("capture")
    with pools.pool_of_its_own(gpu):
        assert len(taken) == 2
