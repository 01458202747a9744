"""compile_tvm: the compiled step beside the model without it, on every family, quantized or not, fused or not."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

import llmopt
from llmopt import native
from llmopt.errors import InputError, PassError
from llmopt.measure.memory import current_rss
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes import CompileTvm, FuseKernels
from llmopt.passes.base import PassContext
from llmopt.passes.compile_tvm import trial
from llmopt.passes.compile_tvm.verify import compared, verify
from llmopt.runtime.generate import engine_of
from llmopt.runtime.step import DecodeStep

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
TOKENS = 64


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def pair(tiny: Any, rows: Any, family: str, *, int4: bool, fused: bool) -> tuple[Any, Any]:
    """The same model twice: without the pass and with it."""
    before = (["quantize_gptq"] if int4 else []) + (["fuse_kernels"] if fused else [])
    made = []
    for passes in (before, [*before, "compile_tvm"]):
        model = tiny(family)
        if passes:
            llmopt.optimize(model, passes=passes, calibration=rows(4, 48), measure=False)
        made.append(model)
    return made[0], made[1]


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("int4", [False, True], ids=["fp32", "int4"])
@every_family
def test_logits_and_greedy_tokens_are_those_of_the_model_without_it(
    family: str, int4: bool, fused: bool, tiny: Any, decided: Any, token_rows: Any
) -> None:
    plain, compiled = pair(decided if int4 else tiny, token_rows, family, int4=int4, fused=fused)
    generated = details_of(compiled)["kernels"]
    # between fused ops there is nothing left, so that the program is the one without the pass
    assert generated == [] if fused else "rms_norm" in generated
    if int4 and not fused:
        # int8 activations follow the last bit of what comes before them: logits after the same tokens
        resolved, engine = resolve_model(plain), engine_of(compiled)
        assert engine is not None
        ctx = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(1, 20, seed=3)))
        found = verify(ctx, engine, TOKENS)
        assert found["agree"] >= TOKENS - 8
        assert found["cosine"] > 0.998
        return
    ids = token_rows(1, 20, seed=3)
    want, got = decoded(plain, ids), decoded(compiled, ids)
    assert torch.equal(want.sequences, got.sequences)
    expected, found = torch.stack(want.logits).float(), torch.stack(got.logits).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_one_pass_above_the_other_is_no_fallback(tiny: Any, token_rows: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, compiled = pair(tiny, token_rows, "qwen3", int4=False, fused=True)
    decoded(compiled, token_rows(1, 9))
    assert [row.details["fallbacks_to_own_loop"] for row in llmopt.report(compiled).passes] == [{}, {}]
    assert "own loop" not in caplog.text
    decoded(compiled, token_rows(1, 9), num_beams=2)
    counted = [row.details["fallbacks_to_own_loop"] for row in llmopt.report(compiled).passes]
    assert counted == [{"generation mode beam_search": 1}, {}]


def details_of(model: Any) -> dict[str, Any]:
    (row,) = [row for row in llmopt.report(model).passes if row.name == "compile_tvm"]
    assert row.verdict == "kept", row.reason
    details: dict[str, Any] = row.details
    return details


@pytest.mark.parametrize("family", ["qwen3", "ernie4_5_moe", "deepseek_v3"])
def test_batches_of_any_size_with_left_padding_agree(family: str, tiny: Any, token_rows: Any) -> None:
    plain, compiled = pair(tiny, token_rows, family, int4=False, fused=False)
    for sequences in (2, 5, 66):
        ids = token_rows(sequences, 11, seed=sequences)
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        want, got = (decoded(model, ids, attention_mask=mask).sequences for model in (plain, compiled))
        assert torch.equal(want, got)


@pytest.mark.parametrize("backend", ["tvm", "inductor"])
def test_what_is_not_greedy_agrees_too(backend: str, tiny: Any, token_rows: Any) -> None:
    plain, compiled = tiny("qwen3"), tiny("qwen3")
    passes = [CompileTvm(backend=backend)]
    llmopt.optimize(compiled, passes=passes, calibration=token_rows(4, 48), measure=False)
    ids = token_rows(1, 12)
    # greedy in between: a step is compiled for each way of choosing
    greedy: dict[str, Any] = {"do_sample": False}
    sampled = {"do_sample": True, "top_k": 20, "top_p": 0.9}
    for options in (sampled, greedy, sampled, {"num_beams": 3}, {"repetition_penalty": 1.2}):
        tokens = []
        for model in (plain, compiled):
            torch.manual_seed(5)
            tokens.append(model.generate(ids, max_new_tokens=12, pad_token_id=0, eos_token_id=None, **options))
        assert torch.equal(*tokens), options


def test_prompt_lookup_and_int8_caches_of_fuse_kernels_go_on(tiny: Any, token_rows: Any) -> None:
    ids = token_rows(1, 8).repeat(1, 4)
    tokens = []
    for passes in ([], ["compile_tvm"]):
        model = tiny("qwen3")
        fuse = FuseKernels(prompt_lookup=4, kv_dtype="int8")
        llmopt.optimize(model, passes=[fuse, *passes], calibration=token_rows(4, 48), measure=False)
        tokens.append(decoded_plainly(model, ids))
        engine = engine_of(model)
        assert engine is not None
        assert engine.kv_dtype == torch.int8
    assert torch.equal(*tokens)


def decoded_plainly(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out


def test_the_pass_under_it_may_come_and_go(tiny: Any, token_rows: Any) -> None:
    model, ids = tiny("qwen3"), token_rows(1, 12)
    want = decoded_plainly(model, ids)
    resolved = resolve_model(model)
    ctx = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(2, 40)))
    fuse = FuseKernels().apply(ctx).patch
    fuse.enable()
    compiled = CompileTvm().apply(ctx).patch
    for on in ((fuse, compiled), (compiled,), (fuse,), (compiled,), (fuse, compiled), ()):
        for patch in (compiled, fuse):
            patch.disable()
        for patch in on:
            patch.enable()
        assert torch.equal(decoded_plainly(model, ids), want)
        engine: Any = engine_of(model)
        assert getattr(engine, "fused", None) == (fuse in on if compiled in on else None)


def test_restore_gives_the_model_back(tiny: Any, token_rows: Any, same_bits: Any, snapshot: Any) -> None:
    model = tiny("ernie4_5")
    before, attributes = snapshot(model), set(vars(model))
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    assert "generate" in vars(model)
    llmopt.restore(model)
    assert same_bits(model.state_dict(), before)
    assert set(vars(model)) == attributes


def test_a_copy_decodes_by_itself(tiny: Any, token_rows: Any) -> None:
    model, ids = tiny("qwen3"), token_rows(1, 12)
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    want = decoded_plainly(model, ids)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert torch.equal(decoded_plainly(other, ids), want)


def test_weights_are_shared_and_not_copied(tiny: Any, token_rows: Any) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    engine: Any = engine_of(model)
    held = {t.data_ptr() for tensors in engine.tensors for t in map(torch.from_dlpack, tensors)}
    linears = [m.weight.data_ptr() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert linears
    assert held.issuperset(linears)


def test_ten_thousand_steps_leave_nothing_behind(tiny: Any, token_rows: Any) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    engine: Any = engine_of(model)
    cache = engine.new_cache(1, 16)
    step = DecodeStep(engine, cache, greedy=True)

    def run(times: int) -> int:
        for _ in range(times):
            step.start(torch.ones(1, dtype=torch.int32))
            step.run()
        gc.collect()
        found = current_rss().value
        assert found is not None
        return int(found)

    before = run(1000)
    assert run(10_000) - before < 1 << 20


def test_wrong_logits_are_an_error() -> None:
    good = torch.randn(4, 64)
    assert compared(good, good + 1e-5, (0.99, 0.97))["agree"] == 4
    with pytest.raises(PassError, match="other logits"):
        compared(good, good.flip(-1), (0.9, 0.7))
    with pytest.raises(PassError, match="NaN or Inf"):
        compared(good, good * torch.nan, (0.9, 0.7))


def test_without_tvm_it_says_how_to_get_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    resolved = resolve_model(tiny("qwen3"))
    verdict = CompileTvm().check(PassContext(resolved, resolved.device, lambda event: None))
    assert not verdict.applies
    assert "pip install llmopt[tvm]" in verdict.reason


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("family", ["qwen3", "ernie4_5_moe", "deepseek_v2"])
def test_inductor_gives_the_same_tokens_for_any_batch(family: str, fused: bool, tiny: Any, token_rows: Any) -> None:
    # two models in one process, and two batches: what was compiled for one must not serve another
    for seed in (0, 1):
        plain, model = tiny(family), tiny(family)
        with torch.no_grad():
            for changed in (plain, model):
                changed.lm_head.weight.copy_(torch.randn_like(changed.lm_head.weight, generator=seeded(seed)))
        passes = [*(["fuse_kernels"] if fused else []), CompileTvm(backend="inductor")]
        llmopt.optimize(model, passes=passes, calibration=token_rows(2, 40), measure=False)
        assert details_of(model)["verified"]["agree"] == 16
        for ids in (token_rows(1, 12), token_rows(1, 40), token_rows(3, 12)):
            assert torch.equal(decoded(plain, ids).sequences, decoded(model, ids).sequences)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_auto_keeps_the_faster_and_shows_both(tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio, kept in ((1.5, "tvm"), (0.5, "inductor")):
        interval = {"value": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio, "rounds": 5}
        monkeypatch.setattr(trial, "compare", lambda engines, depth, said=interval: {"ratio": said})
        resolved = resolve_model(tiny("qwen3"))
        ctx = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(2, 40)))
        applied = CompileTvm(backend="auto").apply(ctx)
        assert applied.details["backend"] == kept
        assert applied.settled == {"backend": kept, "tune_s": 0.0, "records": None}
        assert applied.details["inductor"]["verified"]["agree"] == 16
        assert any(f"{ratio:.2f}x" in line for line in applied.details["said"])
        applied.patch.enable()
        engine: Any = engine_of(resolved.model)
        assert type(engine).__name__ == {"tvm": "TvmEngine", "inductor": "InductorEngine"}[kept]
        # what the trial has compiled is not compiled again
        assert kept == "tvm" or engine._steps


def test_where_inductor_fails_tvm_stays(tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **named: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)
    resolved = resolve_model(tiny("qwen3"))
    ctx = PassContext(resolved, resolved.device, lambda event: None, calibration=list(token_rows(2, 40)))
    applied = CompileTvm(backend="auto").apply(ctx)
    assert applied.details["backend"] == "tvm"
    assert "Inductor failed: RuntimeError: no C++ compiler" in applied.details["said"]


@pytest.mark.parametrize("options", [{"backend": "gcc"}, {"cache": "yes"}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        CompileTvm(**options)


def test_a_cache_goes_from_hand_to_hand(tiny: Any, token_rows: Any) -> None:
    # DeepSeek's own layers keep rotated pairs as halves, the compiled step does not
    model, ids = tiny("deepseek_v3"), token_rows(1, 12)
    more = token_rows(1, 3, seed=9)
    longer = torch.cat([ids, decoded_plainly(model, ids)[:, 12:], more], 1)
    want, after = decoded_plainly(model, longer), model(longer).logits[:, -1]
    beams = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    best = model.generate(longer, **beams)
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    for go_on in ("generate", "forward", "beams"):
        out = decoded(model, ids)
        cache = out.past_key_values
        assert torch.equal(out.sequences, longer[:, :-3])
        if go_on == "generate":
            options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            assert torch.equal(model.generate(longer, past_key_values=cache, **options), want)
        elif go_on == "forward":
            held = cache.get_seq_length()
            logits = model(longer[:, held:], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, after, rtol=0, atol=1e-4 * float(after.abs().max()))
        else:
            # beams are transformers' own, and go on in a cache that the compiled step has filled
            cache.batch_repeat_interleave(2)
            assert torch.equal(model.generate(longer, past_key_values=cache, **beams), best)


def test_a_cache_of_the_models_own_layers_is_read_by_the_step(tiny: Any, token_rows: Any) -> None:
    model, ids = tiny("deepseek_v3"), token_rows(1, 12)
    want = decoded_plainly(model, ids)
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    engine: Any = engine_of(model)
    cache = engine.new_cache(1, 128)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)  # by the model's own layers
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)


def test_callers_in_two_threads_get_their_own_tokens(tiny: Any, token_rows: Any) -> None:
    model = tiny("qwen3")
    prompts = [token_rows(1, 12, seed=seed) for seed in range(4)]
    want = [decoded_plainly(model, ids) for ids in prompts]
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda ids: decoded_plainly(model, ids), prompts))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_was_compiled_goes_with_the_model(tiny: Any, token_rows: Any) -> None:
    model = tiny("qwen3")
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    decoded_plainly(model, token_rows(1, 12))
    engine: Any = engine_of(model)
    machine = weakref.ref(engine.machine)
    llmopt.restore(model)
    del engine
    gc.collect()
    assert machine() is None


@pytest.mark.parametrize("family", ["qwen3", "ernie4_5_moe", "deepseek_v2"])
def test_bfloat16_decodes_much_the_same(family: str, tiny: Any, token_rows: Any) -> None:
    model = tiny(family, torch.bfloat16)
    llmopt.optimize(model, passes=["compile_tvm"], calibration=token_rows(2, 40), measure=False)
    assert details_of(model)["verified"]["cosine"] > 0.97


def test_what_cannot_be_compiled_is_said_and_an_error_where_asked(
    tiny: Any, token_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **named: Any) -> Any:
        raise KeyError("s0")

    monkeypatch.setattr("llmopt.passes.compile_tvm.compiled.imported", fails)
    settings: dict[str, Any] = {"calibration": token_rows(2, 40), "measure": False}
    model = tiny("qwen3")
    llmopt.optimize(model, passes=[CompileTvm(cache=False)], **settings)
    (row,) = llmopt.report(model).passes
    assert row.verdict == "undone"
    assert "the step cannot be compiled: KeyError: 's0'" in row.reason
    assert "generate" not in vars(model)
    with pytest.raises(PassError, match="cannot be compiled"):
        llmopt.optimize(tiny("qwen3"), passes=[CompileTvm(cache=False)], strict=True, **settings)
