"""An int8 KV cache: tokens as transformers' own layers give them over the same cache, close to those of a plain one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native
from llmopt.checkpoint import recorded_passes
from llmopt.errors import InputError
from llmopt.measure import ceilings, timing
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes import FuseKernels
from llmopt.runtime.cache import KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.step import DecodeStep

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
# heads of keys and values, and latents
every_kind = pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
# their routers have no biases: a near tie may send a token to other experts, which changes its logits a lot
UNDECIDED = {"qwen3_moe", "deepseek_v2"}
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def fuse(model: Any, kv_dtype: str | None = "int8", **options: Any) -> Any:
    passes = [FuseKernels(kv_dtype=kv_dtype, **options)]
    llmopt.optimize(model, passes, measure=False, strict=True, calibration=torch.arange(64).view(2, 32))
    return model


def own_cache(model: Any, sequences: int) -> KVCache:
    """An int8 cache for the layers of a model that is not fused."""
    config = model.config
    if rank := getattr(config, "kv_lora_rank", None):
        dims = (rank + config.qk_rope_head_dim, 0)
        return KVCache(sequences, config.num_hidden_layers, 1, dims, 16, torch.int8, latent_rank=rank)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    return KVCache(sequences, config.num_hidden_layers, heads, (head_dim, head_dim), 16, torch.int8)


def logits_of(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, **given).logits
    return logits.float()


def assert_close(family: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """The root of the mean square of the difference is a few percent of that of ``expected``."""
    if family not in UNDECIDED:
        assert float((got - expected).norm() / expected.norm()) < 0.03
        return
    each = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()  # of a token
    assert float(each.quantile(0.9)) < 0.03
    assert float(each.mean()) < 0.06


@every_family
def test_greedy_tokens_are_those_of_the_models_own_layers_over_such_a_cache(
    family: str, decided: Any, token_rows: Any, isa: str
) -> None:
    """Random models have near ties, and queries are bfloat16 here: each token is one that may win there."""
    plain, model = decided(family), fuse(decided(family))
    prompt = token_rows(4, 19, seed=5)
    mask = torch.ones_like(prompt)
    for row, count in enumerate((0, 7, 18, 3)):
        mask[row, :count] = 0
    got = model.generate(prompt, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **GREEDY), got)
    mask = torch.cat([mask, torch.ones(4, 24, dtype=mask.dtype)], -1)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = logits_of(plain, got, past_key_values=own_cache(plain, 4), **given)[:, 18:-1]
    short = expected.amax(-1) - expected.gather(-1, got[:, 19:, None])[..., 0]
    assert float(short.max()) <= 0.05 * float(expected.std())


@pytest.mark.parametrize("family", ["qwen3", "ernie4_5_moe", "deepseek_v3"])
def test_tokens_of_a_trained_model_agree(family: str, trained: Any, token_rows: Any) -> None:
    plain, model = trained(family), fuse(trained(family))
    prompt = token_rows(3, 30, seed=7)
    mask = torch.ones_like(prompt)
    mask[1, :11] = 0
    expected = plain.generate(prompt, attention_mask=mask, past_key_values=own_cache(plain, 3), **GREEDY)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **GREEDY), expected)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_logits_are_close_to_those_over_a_bf16_cache(
    family: str, dtype: torch.dtype, decided: Any, token_rows: Any
) -> None:
    ids = token_rows(2, 40)
    bf16, int8 = (logits_of(fuse(decided(family, dtype), kind), ids) for kind in ("bf16", "int8"))
    assert not torch.equal(int8, bf16)
    assert_close(family, int8, bf16)


@every_family
def test_forward_without_a_cache_and_step_by_step_agree(family: str, decided: Any, token_rows: Any) -> None:
    model = fuse(decided(family))
    ids = token_rows(2, 20)
    whole = logits_of(model, ids, use_cache=False)
    with torch.no_grad():
        first = model(ids[:, :13], use_cache=True)
        cache = first.past_key_values
        assert cache.dtype == torch.int8
        second = model(ids[:, 13:], past_key_values=cache)
    assert_close(family, torch.cat([first.logits, second.logits], 1), whole)


@every_family
def test_own_layers_and_the_engine_take_turns(family: str, decided: Any, token_rows: Any) -> None:
    model = fuse(decided(family))
    ids = token_rows(2, 20)
    whole = logits_of(model, ids)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *given: None)
        second = model(ids[:, 9:14], past_key_values=cache)
        hook.remove()
        third = model(ids[:, 14:], past_key_values=cache)
    assert list(model.model.forward._fallbacks.values()) == [1]
    assert_close(family, torch.cat([second.logits, third.logits], 1), whole[:, 9:])


def test_beam_search_and_a_cache_that_grows(tiny: Any, token_rows: Any) -> None:
    plain, model = tiny("qwen3"), fuse(tiny("qwen3"))
    prompt = token_rows(2, 11)
    given = {"attention_mask": torch.ones_like(prompt), **GREEDY, "num_beams": 3}
    expected = plain.generate(prompt, past_key_values=own_cache(plain, 6), **given)
    assert torch.equal(model.generate(prompt, **given), expected)


@every_kind
def test_beams_have_the_scores_of_their_tokens(family: str, trained: Any, token_rows: Any) -> None:
    """What beams change places with, they take their cache along: which beam wins may hang on a near tie, its score not."""
    plain, model = trained(family), fuse(trained(family))
    prompt = token_rows(2, 11)
    given = {"attention_mask": torch.ones_like(prompt), **GREEDY, "num_beams": 3}
    got = model.generate(prompt, **given, return_dict_in_generate=True, output_scores=True)
    chosen = logits_of(plain, got.sequences).log_softmax(-1)[:, 10:-1].gather(-1, got.sequences[:, 11:, None])
    torch.testing.assert_close(got.sequences_scores, chosen[..., 0].mean(-1), rtol=0, atol=0.01)


@every_kind
def test_prompt_lookup_gives_the_same_tokens(family: str, tiny: Any, token_rows: Any) -> None:
    prompt = token_rows(1, 12).repeat(1, 4)
    given = {"attention_mask": torch.ones_like(prompt), **GREEDY}
    plain, guessing = fuse(tiny(family)), fuse(tiny(family), prompt_lookup=8)
    assert torch.equal(guessing.generate(prompt, **given), plain.generate(prompt, **given))


@every_kind
def test_a_recorded_step_holds_what_the_cache_had(family: str, tiny: Any, token_rows: Any) -> None:
    """A step goes on over the buffers it was recorded over, scales among them, after the cache has grown."""
    engine = Engine(resolve_model(tiny(family)), kv_dtype=torch.int8)
    cache = engine.new_cache(1, 32)
    cache.length = 4
    for tensor in cache.tensors():
        tensor.fill_(1)
    step = DecodeStep(engine, cache)
    step.start(torch.tensor([4]))
    cache.reserve(1000)
    step.run()
    assert not step.fits(cache, engine)
    assert step.logits.isfinite().all()


def test_the_pass_can_be_undone_bit_by_bit(tiny: Any, token_rows: Any, snapshot: Any, same_bits: Any) -> None:
    model = tiny("qwen3")
    ids, before = token_rows(2, 20), snapshot(model)
    expected = logits_of(model, ids)
    fuse(model)
    model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **GREEDY)
    assert not torch.equal(logits_of(model, ids), expected)
    llmopt.restore(model)
    assert torch.equal(logits_of(model, ids), expected)
    assert same_bits(model.state_dict(), before)


def test_a_copy_has_such_a_cache_too(tiny: Any, token_rows: Any) -> None:
    model = fuse(tiny("qwen3"))
    ids = token_rows(1, 20)
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other, ids), logits_of(model, ids))


def test_the_receipt_names_the_dtype_and_measures_with_it(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, quality = timing.Plan(prompt_tokens=8, decode_tokens=3, min_rounds=3, max_rounds=3), {}
    monkeypatch.setattr(timing, "Plan", lambda **given: plan)
    monkeypatch.setattr(ceilings, "usable_meter", lambda: None)
    for kind, name in (("fp32", "float32"), ("int8", "int8")):
        model = trained("qwen3")
        llmopt.optimize(model, [FuseKernels(kv_dtype=kind)], quality_budget=None)
        row = llmopt.report(model).passes[0]
        assert row.details["kv_dtype"] == name
        assert row.options["kv_dtype"] == kind
        quality[kind] = row.quality.mean_kl
    assert quality["fp32"] < 1e-7
    assert 1e-6 < quality["int8"] < 0.01


def test_a_saved_model_comes_back_with_such_a_cache(tiny: Any, token_rows: Any, tmp_path: Path) -> None:
    model, ids = fuse(tiny("qwen3")), token_rows(1, 20)
    directory = llmopt.save(model, tmp_path / "out")
    assert recorded_passes(directory)["fuse_kernels"]["kv_dtype"] == "int8"
    loaded = llmopt.load(directory)
    with torch.no_grad():
        assert loaded(ids, use_cache=True).past_key_values.dtype == torch.int8
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_another_dtype_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"kv_dtype: expected None or bf16 \| fp16 \| fp32 \| int8, got 'int4'"):
        FuseKernels(kv_dtype="int4")
