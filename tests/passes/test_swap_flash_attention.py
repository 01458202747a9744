"""swap_flash_attention: the same outputs as eager attention in every way a model is run, and nothing left behind."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from llmopt import native
from llmopt.errors import InputError, PassError
from llmopt.models import FAMILIES, resolve_model
from llmopt.passes import SwapFlashAttention
from llmopt.passes.base import Applied, PassContext, Patch, Swap
from llmopt.passes.swap_flash_attention import candidates, forward
from llmopt.passes.swap_flash_attention.candidates import Bench, Choice
from llmopt.passes.swap_flash_attention.forward import INTERFACE_NAME
from llmopt.passes.swap_flash_attention.mla import LatentAttention

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

EVERY_FAMILY = [family.model_type for family in FAMILIES]
LATENT = [family.model_type for family in FAMILIES if family.attention.kind == "mla"]
SLIDING = ["qwen2", "qwen3"]

Tiny = Callable[..., Any]
Rows = Callable[..., torch.Tensor]


def context(model: Any) -> PassContext:
    return PassContext(resolve_model(model), torch.device("cpu"), lambda event: None, prompt_tokens=16)


def eager(model: Any) -> Any:
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    return model


def applied(model: Any, *, prefill: str = "llmopt", decode: str = "llmopt", most_absorbed: int = 4) -> Applied:
    """The pass with a fixed choice, as if it had been measured so."""
    chosen = Choice(prefill, decode), most_absorbed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwapFlashAttention, "_choose", lambda self, ctx, usable, latents: chosen)
        return SwapFlashAttention().apply(context(model))


@pytest.fixture(params=["llmopt", "sdpa+llmopt", "sdpa"])
def kinds(request: pytest.FixtureRequest) -> dict[str, str]:
    prefill, _, decode = request.param.partition("+")
    return {"prefill": prefill, "decode": decode or prefill}


@pytest.fixture(params=EVERY_FAMILY)
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Any:
    return eager(tiny(request.param))


@pytest.fixture
def generate(token_rows: Rows) -> Callable[..., torch.Tensor]:
    """Twenty tokens, greedily unless told otherwise."""

    def run(model: Any, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        ids = token_rows(2, 11) if ids is None else ids
        out: torch.Tensor = model.generate(ids, max_new_tokens=20, **{"do_sample": False, **options})
        return out

    return run


def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids, **inputs).logits
    return out


def switched(model: Any, patch: Patch, run: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without and with the pass."""
    without = run(model)
    patch.enable()
    try:
        return without, run(model)
    finally:
        patch.disable()


def close(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(pair[1], pair[0], rtol=1e-4, atol=1e-4)


# ---- outputs


def test_logits_are_those_of_eager(model: Any, kinds: dict[str, str], token_rows: Rows) -> None:
    close(switched(model, applied(model, **kinds).patch, lambda m: logits(m, token_rows(2, 75))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("model_type", EVERY_FAMILY)
def test_low_precision_is_no_worse_than_eager(
    model_type: str, dtype: torch.dtype, tiny: Tiny, token_rows: Rows
) -> None:
    ids = token_rows(2, 60)
    low = eager(tiny(model_type, dtype))
    # the very numbers of the low-precision model, computed in float32
    high = eager(tiny(model_type))
    high.load_state_dict(low.state_dict())
    truth = logits(high, ids)
    plain, swapped = switched(low, applied(low, most_absorbed=100).patch, lambda m: logits(m, ids).float())
    # medians: where two experts are all but equal, the last bit decides which one a token goes to
    assert (swapped - truth).abs().median() <= 1.25 * (plain - truth).abs().median() + 1e-4


def test_generates_the_same_tokens(model: Any, kinds: dict[str, str], generate: Callable[..., torch.Tensor]) -> None:
    without, with_pass = switched(model, applied(model, **kinds).patch, generate)
    assert torch.equal(without, with_pass)
    assert with_pass.shape[1] == 31


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"num_beams": 3},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "chunked_prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generates_the_same_tokens_in_every_way(
    model: Any, options: dict[str, Any], token_rows: Rows, generate: Callable[..., torch.Tensor]
) -> None:
    ids = token_rows(1 if "prompt_lookup_num_tokens" in options else 2, 11)
    without, with_pass = switched(model, applied(model).patch, lambda m: generate(m, ids, **options))
    assert torch.equal(without, with_pass)


def test_streams(model: Any, token_rows: Rows, generate: Callable[..., torch.Tensor]) -> None:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    applied(model).patch.enable()
    out = generate(model, token_rows(1, 9), streamer=streamer)
    assert streamer.seen == out[0].tolist()
    assert streamer.ended


def test_left_padded_batch_equals_single_runs(
    model: Any, kinds: dict[str, str], token_rows: Rows, generate: Callable[..., torch.Tensor]
) -> None:
    applied(model, **kinds).patch.enable()
    lengths, most = (5, 12, 9), 12
    rows = [token_rows(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (most - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(most) >= most - n for n in lengths]).long()
    batch = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = generate(model, row, attention_mask=torch.ones_like(row))
        assert torch.equal(batch[i, most:], alone[0, row.shape[1] :])


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padded_logits_are_those_of_eager(model: Any, padding: str, kinds: dict[str, str], token_rows: Rows) -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    where = {"left": slice(0, 13), "right": slice(30, 40), "holes": slice(10, 20)}[padding]
    mask[0, where] = 0
    pair = switched(
        model, applied(model, **kinds).patch, lambda m: logits(m, token_rows(2, 40), attention_mask=mask)[mask.bool()]
    )
    close(pair)


def masks_for(kind: str) -> torch.Tensor:
    causal = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()
    causal[1, :, :, 3:9] = False
    causal[:, :, torch.arange(30), torch.arange(30)] = True
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    return {"bool": causal, "additive": additive, "bias": additive + 0.5 * (torch.arange(30) % 2)}[kind]


@pytest.mark.parametrize("kind", ["bool", "additive", "bias"])
def test_masks_of_the_caller(model: Any, kind: str, token_rows: Rows) -> None:
    """Four dimensions, bool as for SDPA or added to the scores as for eager; a bias that is no mask goes to eager."""
    made = applied(model)
    eager_form = masks_for("additive") if kind == "bool" else masks_for(kind)
    without = logits(model, token_rows(2, 30), attention_mask=eager_form)
    made.patch.enable()
    close((without, logits(model, token_rows(2, 30), attention_mask=masks_for(kind))))
    assert (sum(made.details["fallbacks_to_eager"].values()) > 0) == (kind == "bias")


def test_packed_sequences_do_not_see_each_other(model: Any, token_rows: Rows) -> None:
    positions = torch.cat([torch.arange(20), torch.arange(15)])[None]
    ids = token_rows(1, 35)
    run = lambda m: logits(m, ids, position_ids=positions, use_cache=False)  # noqa: E731
    pair = switched(model, applied(model).patch, run)
    close(pair)
    with torch.no_grad():
        alone = model(ids[:, 20:], use_cache=False).logits
    torch.testing.assert_close(pair[1][:, 20:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [(10, 7, 1, 5), (1, 1, 20)], ids=str)
def test_several_tokens_after_a_cache(
    model: Any, chunks: tuple[int, ...], kinds: dict[str, str], token_rows: Rows
) -> None:
    ids = token_rows(2, sum(chunks))

    def run(m: Any) -> torch.Tensor:
        cache, out = None, []
        with torch.no_grad():
            for part in ids.split(chunks, dim=1):
                step = m(part, past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                out.append(step.logits)
        return torch.cat(out, 1)

    close(switched(model, applied(model, **kinds).patch, run))


def test_static_cache_with_an_unfilled_tail(model: Any, token_rows: Rows) -> None:
    ids = token_rows(2, 14)

    def run(m: Any) -> torch.Tensor:
        cache = StaticCache(config=m.config, max_cache_len=40)
        with torch.no_grad():
            parts = [m(part, past_key_values=cache, use_cache=True).logits for part in ids.split([9, 1, 4], dim=1)]
        return torch.cat(parts, 1)

    close(switched(model, applied(model).patch, run))


@pytest.mark.parametrize("most_absorbed", [0, 1, 1000])
@pytest.mark.parametrize("model_type", LATENT)
def test_absorbed_and_expanded_latents_agree(
    model_type: str, most_absorbed: int, tiny: Tiny, token_rows: Rows, generate: Callable[..., torch.Tensor]
) -> None:
    model = eager(tiny(model_type))
    made = applied(model, most_absorbed=most_absorbed)
    close(switched(model, made.patch, lambda m: logits(m, token_rows(3, 33))))
    without, with_pass = switched(model, made.patch, lambda m: generate(m, token_rows(3, 9)))
    assert torch.equal(without, with_pass)


@pytest.mark.parametrize("model_type", SLIDING)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_sliding_window(model_type: str, padded: bool, kinds: dict[str, str], token_rows: Rows) -> None:
    from transformers import AutoConfig

    from llmopt.models import family_for
    from llmopt.models.shapes import build

    options = {**family_for(model_type).tiny_config, "use_sliding_window": True, "sliding_window": 8}
    options["max_window_layers"] = 1
    model = eager(build(AutoConfig.for_model(model_type, **options), dtype=torch.float32))
    assert "sliding_attention" in model.config.layer_types
    made = applied(model, **kinds)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, : 17 if padded else 0] = 0
    close(switched(model, made.patch, lambda m: logits(m, token_rows(2, 50), attention_mask=mask)[mask.bool()]))
    options = {"attention_mask": mask[:, :30], "max_new_tokens": 20, "do_sample": False}
    without, with_pass = switched(model, made.patch, lambda m: m.generate(token_rows(2, 30), **options))
    assert torch.equal(without, with_pass)


# ---- what the kernels do not cover


def test_attention_weights_come_from_eager(model: Any, token_rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    made = applied(model)
    with torch.no_grad():
        want = model(token_rows(2, 12), output_attentions=True)
        made.patch.enable()
        with caplog.at_level(logging.WARNING, "llmopt"):
            got = model(token_rows(2, 12), output_attentions=True)
            model(token_rows(2, 12), output_attentions=True)
    assert len(got.attentions) == model.config.num_hidden_layers
    for a, b in zip(got.attentions, want.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    close((want.logits, got.logits))
    counted = made.details["fallbacks_to_eager"]
    assert list(counted.values()) == [2 * model.config.num_hidden_layers]
    assert len([r for r in caplog.records if "attention weights" in r.message]) == 1


def test_gradients_are_those_of_eager(model: Any, token_rows: Rows) -> None:
    made = applied(model)
    ids = token_rows(2, 12)
    weight = resolve_model(model).layers[0].attention.o_proj.weight  # type: ignore[union-attr]
    embedding = model.get_input_embeddings().weight.requires_grad_(True)

    def gradient(m: Any) -> torch.Tensor:
        embedding.grad = None
        m(ids).logits.square().mean().backward()
        assert embedding.grad is not None
        return embedding.grad.clone()

    close(switched(model, made.patch, gradient))
    assert weight.grad is None
    assert any("gradients" in reason for reason in made.details["fallbacks_to_eager"])


def test_dropout_goes_to_eager(tiny: Tiny, token_rows: Rows) -> None:
    model = eager(tiny("qwen3"))
    made = applied(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    made.patch.enable()
    model.train()
    first, second = logits(model, token_rows(1, 9)), logits(model, token_rows(1, 9))
    assert not torch.equal(first, second)
    assert "dropout is on" in made.details["fallbacks_to_eager"]


def test_refuses_a_paged_cache(tiny: Tiny) -> None:
    module = resolve_model(tiny("qwen3")).layers[0].attention
    q = torch.zeros(1, 4, 1, 32)
    with pytest.raises(InputError, match="continuous batching"):
        forward.attention_function(module, q, q[:, :2], q[:, :2], None, cache=object())


def test_not_causal_is_not_causal(tiny: Tiny) -> None:
    module = resolve_model(tiny("qwen3")).layers[0].attention
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 32, generator=g) for h in (4, 2, 2))
    out, _ = forward.attention_function(module, q, k, v, None, scaling=0.2, is_causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


# ---- patching


def test_undo_is_exact(model: Any, token_rows: Rows) -> None:
    ids = token_rows(2, 20)
    before, keys = logits(model, ids), list(model.state_dict())
    modules, config = [name for name, _ in model.named_modules()], model.config.to_dict()
    attributes = [set(vars(module)) for module in model.modules()]
    made = applied(model)
    for _ in range(3):
        made.patch.enable()
        assert model.config._attn_implementation == INTERFACE_NAME
        assert list(model.state_dict()) == keys
        swapped = logits(model, ids)
        made.patch.disable()
        assert torch.equal(logits(model, ids), before)
        assert not torch.equal(swapped, before)
    assert model.config._attn_implementation == "eager"
    assert [name for name, _ in model.named_modules()] == modules
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.config.to_dict() == config


@pytest.mark.parametrize("given", ["eager", "sdpa"])
def test_restores_what_was_given(given: str, tiny: Tiny) -> None:
    model = tiny("llama")
    model.config._attn_implementation = given
    made = applied(model)
    made.patch.enable()
    made.patch.disable()
    assert model.config._attn_implementation == given


def test_other_models_are_left_alone(tiny: Tiny, token_rows: Rows) -> None:
    mine, other = eager(tiny("deepseek_v3")), eager(tiny("deepseek_v3"))
    before = logits(other, token_rows(1, 9))
    applied(mine).patch.enable()
    assert other.config._attn_implementation == "eager"
    assert torch.equal(logits(other, token_rows(1, 9)), before)


def test_saves_and_loads_like_any_model(model: Any, tmp_path: Any, token_rows: Rows) -> None:
    before = logits(model, token_rows(1, 9))
    applied(model).patch.enable()
    model.save_pretrained(tmp_path)
    assert INTERFACE_NAME not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    close((before, logits(again, token_rows(1, 9))))


def test_a_copy_stands_on_its_own(model: Any, token_rows: Rows) -> None:
    made = applied(model)
    made.patch.enable()
    want = logits(model, token_rows(2, 9))
    twin = copy.deepcopy(model)
    made.patch.disable()
    assert torch.equal(logits(twin, token_rows(2, 9)), want)


def test_hooks_and_signature_stay(model: Any, token_rows: Rows) -> None:
    attention = resolve_model(model).layers[0].attention
    signature = inspect.signature(attention.forward)
    calls: list[str] = []
    attention.register_forward_pre_hook(lambda module, args: calls.append("before"))
    attention.register_forward_hook(lambda module, args, output: calls.append("after"))
    applied(model).patch.enable()
    logits(model, token_rows(1, 9))
    assert calls == ["before", "after"]
    assert inspect.signature(attention.forward) == signature


def test_sdpa_alone_is_transformers_own_path(tiny: Tiny) -> None:
    model = eager(tiny("qwen3"))
    made = applied(model, prefill="sdpa", decode="sdpa")
    made.patch.enable()
    assert model.config._attn_implementation == "sdpa"


# ---- latent attention over quantized projections


class Rounded(nn.Module):
    """A linear that keeps its weight in another form, as quantized ones do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round())
        self.register_buffer("scale", scale)
        self.calls = 0

    def dequantize(self) -> torch.Tensor:
        self.calls += 1
        return self.codes * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.codes * self.scale)


@pytest.fixture(params=LATENT)
def rounded(request: pytest.FixtureRequest, tiny: Tiny) -> tuple[Any, Patch]:
    """A latent model and a patch that quantizes its kv_b_proj."""
    model = eager(tiny(request.param))
    attentions: list[Any] = [layer.attention for layer in resolve_model(model).layers]
    return model, Patch([Swap(module, "kv_b_proj", Rounded(module.kv_b_proj)) for module in attentions])


def test_absorbs_a_quantized_projection(
    rounded: tuple[Any, Patch], token_rows: Rows, generate: Callable[..., torch.Tensor]
) -> None:
    model, quantize = rounded
    quantize.enable()
    made = applied(model)
    without, with_pass = switched(model, made.patch, generate)
    assert torch.equal(without, with_pass)
    close(switched(model, made.patch, lambda m: logits(m, token_rows(2, 4))))
    layers = model.config.num_hidden_layers
    assert made.coverage.weight_bytes_after == layers * 4 * quantize.swaps[0].after.codes.numel()
    assert [swap.after.calls for swap in quantize.swaps] == [1] * layers


def test_follows_the_projection_in_place(rounded: tuple[Any, Patch], token_rows: Rows) -> None:
    """Another pass is switched on and off while this one stays on."""
    model, quantize = rounded
    ids = token_rows(2, 4)
    plain = logits(model, ids)
    quantize.enable()
    coarse = logits(model, ids)
    quantize.disable()
    made = applied(model)
    made.patch.enable()
    for _ in range(2):
        close((plain, logits(model, ids)))
        quantize.enable()
        close((coarse, logits(model, ids)))
        quantize.disable()
    assert (coarse - plain).abs().max() > 1e-3


def test_a_plain_projection_is_not_copied(tiny: Tiny) -> None:
    model = eager(tiny("deepseek_v2"))
    made = applied(model)
    made.patch.enable()
    assert made.coverage.weight_bytes_after == 0
    attention: Any = resolve_model(model).layers[0].attention
    assert attention.llmopt_latent.weight().data_ptr() == attention.kv_b_proj.weight.data_ptr()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "kv_b_proj", nn.Linear(64, 256)), "bias"),
        (lambda m: setattr(m, "kv_b_proj", nn.Identity()), "Identity"),
    ],
    ids=["bias", "unreadable"],
)
def test_says_why_latents_are_not_absorbed(change: Callable[[Any], None], reason: str, tiny: Tiny) -> None:
    model = eager(tiny("deepseek_v3"))
    for layer in resolve_model(model).layers:
        change(layer.attention)
    made = applied(model)
    assert reason in made.coverage.skipped["absorbed latents"]
    assert not any(swap.attr == "expand_kv" for swap in made.patch.swaps)


# ---- choosing


def test_measures_and_reports(model: Any) -> None:
    ctx = context(model)
    assert SwapFlashAttention().check(ctx).applies
    made = SwapFlashAttention().apply(ctx)
    times = made.details["times_us"]
    assert list(times) == ["prefill 16 x 16", "prefill 1024 x 1024", "decode 1 x 16", "decode 1 x 4096"]
    for measured in times.values():
        assert set(measured) == {"llmopt", "sdpa"}
        assert all(us > 0 for us in measured.values())
    assert set(made.coverage.implementations) == {"prefill", "decode"}
    assert made.coverage.touched == model.config.num_hidden_layers
    assert made.coverage.skipped == {"cudnn": "runs on CUDA", "flash_attn": "runs on CUDA"}
    assert not made.changes_numerics
    json.dumps(made.details)


def test_force_takes_no_measurements(tiny: Tiny) -> None:
    made = SwapFlashAttention(force="llmopt").apply(context(eager(tiny("qwen3"))))
    assert made.details["times_us"] == {}
    assert made.coverage.implementations == {"prefill": "llmopt", "decode": "llmopt"}


def test_takes_the_fastest_of_each_kind(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(self: Bench, names: list[str], queries: int, keys: int) -> dict[str, float]:
        return {"llmopt": 2.0, "sdpa": 1.0} if queries > 1 else {"llmopt": 1.0, "sdpa": 2.0}

    monkeypatch.setattr(Bench, "times", times)
    made = SwapFlashAttention().apply(context(eager(tiny("qwen3"))))
    assert made.coverage.implementations == {"prefill": "sdpa", "decode": "llmopt"}
    plan = next(swap.after for swap in made.patch.swaps if swap.attr == "llmopt_attention")
    assert (plan.prefill, plan.decode) == ("sdpa", "llmopt")


def test_the_plan_decides_what_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, token_rows: Rows) -> None:
    ran: list[tuple[str, int]] = []
    for name, run in list(forward.CANDIDATES.items()):

        def spy(module: Any, q: Any, *rest: Any, name: str = name, run: Any = run) -> torch.Tensor:
            ran.append((name, q.shape[2]))
            out: torch.Tensor = run(module, q, *rest)
            return out

        monkeypatch.setitem(forward.CANDIDATES, name, spy)
    model = eager(tiny("qwen3"))
    applied(model, prefill="sdpa", decode="llmopt").patch.enable()
    model.generate(token_rows(1, 12), max_new_tokens=3, do_sample=False)
    assert set(ran) == {("sdpa", 12), ("llmopt", 1)}


def test_drops_a_wrong_candidate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        return forward.run_llmopt(module, q, k, v, *rest) * 1.1

    monkeypatch.setitem(forward.CANDIDATES, "sdpa", wrong)
    made = SwapFlashAttention().apply(context(model))
    assert "wrong by" in made.coverage.skipped["sdpa"]
    assert all("llmopt" in name for name in made.coverage.implementations.values())


def test_fails_when_every_candidate_is_wrong(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(module: Any, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.full_like(q.transpose(1, 2), torch.nan)

    for name in ("llmopt", "sdpa"):
        monkeypatch.setitem(forward.CANDIDATES, name, nothing)
    with pytest.raises(PassError, match="no candidate is right"):
        SwapFlashAttention().apply(context(eager(tiny("qwen3"))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", EVERY_FAMILY)
def test_no_right_candidate_is_dropped(model_type: str, dtype: torch.dtype, tiny: Tiny) -> None:
    ctx = context(eager(tiny(model_type, dtype)))
    attention: Any = ctx.resolved.layers[0].attention
    latent = LatentAttention(attention) if model_type in LATENT else None
    bench = Bench(attention, latent, ctx.config, dtype, ctx.device)
    for most_absorbed in (0, 1000) if latent else (0,):
        if latent is not None:
            latent.most_absorbed = most_absorbed
        assert [bench.error_of(name) for name in ("llmopt", "sdpa")] == ["", ""]


@pytest.mark.parametrize(
    ("absorbed", "expanded", "crossing"),
    [((1.0, 32.0), (17.0, 17.0), 17), ((1.0, 2.0), (5.0, 9.0), candidates._NO_CROSSING), ((3.0, 9.0), (1.0, 2.0), 1)],
    ids=["between", "never", "at_once"],
)
def test_crossing_of_the_two_forms(
    absorbed: tuple[float, float], expanded: tuple[float, float], crossing: int, tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ctx = context(eager(tiny("deepseek_v2")))
    attention: Any = ctx.resolved.layers[0].attention
    latent = LatentAttention(attention)
    bench = Bench(attention, latent, ctx.config, torch.float32, ctx.device)
    answers = iter(
        [dict(zip(("absorbed", "expanded"), pair, strict=True)) for pair in zip(absorbed, expanded, strict=True)]
    )
    monkeypatch.setattr(Bench, "time_runs", lambda self, runs: next(answers))
    assert candidates.absorbed_crossing(bench, latent) == crossing


# ---- when it does not apply


def test_runs_without_compiled_kernels(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    ctx = context(model)
    assert SwapFlashAttention().check(ctx).applies
    made = SwapFlashAttention().apply(ctx)
    assert {*made.coverage.implementations.values()} == {"sdpa"}
    assert "not installed" in made.coverage.skipped["llmopt"]


@pytest.mark.parametrize(
    ("options", "given", "reason"),
    [
        ({"force": "llmopt"}, "eager", "not installed"),
        ({}, "sdpa", "already"),
        ({"candidates": ("llmopt",)}, "eager", "not"),
    ],
    ids=["force", "stock", "candidates"],
)
def test_not_applicable_without_compiled_kernels(
    options: dict[str, Any], given: str, reason: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    model = tiny("qwen3")
    model.config._attn_implementation = given
    verdict = SwapFlashAttention(**options).check(context(model))
    assert not verdict.applies
    assert reason in verdict.reason


def test_not_applicable_for_flash_attn_on_cpu(tiny: Tiny) -> None:
    verdict = SwapFlashAttention(force="flash_attn").check(context(tiny("qwen3")))
    assert not verdict.applies
    assert "CUDA" in verdict.reason


def test_our_kernel_is_not_offered_for_double(tiny: Tiny) -> None:
    verdict = SwapFlashAttention(force="llmopt").check(context(tiny("qwen3").double()))
    assert not verdict.applies
    assert "float64" in verdict.reason


@pytest.mark.parametrize(
    "options",
    [{"force": "fastest"}, {"candidates": ()}, {"candidates": "sdpa"}, {"candidates": ("sdpa", "xformers")},
     {"force": "sdpa", "candidates": ("sdpa",)}],
    ids=["force", "none", "a_string", "unknown", "both"],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^(force|candidates): expected"):
        SwapFlashAttention(**options)


def test_registers_one_name_once() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    before = set(AttentionInterface().valid_keys()) - {INTERFACE_NAME}
    assert forward.register() == forward.register() == INTERFACE_NAME
    assert set(AttentionInterface().valid_keys()) == before | {INTERFACE_NAME}
    assert AttentionMaskInterface()[INTERFACE_NAME] is forward.compact_mask
    assert "flash" not in INTERFACE_NAME


def test_the_name_serves_models_loaded_with_it(tiny: Tiny, token_rows: Rows) -> None:
    model = eager(tiny("qwen3"))
    want = logits(model, token_rows(1, 12))
    model.set_attn_implementation(forward.register())
    close((want, logits(model, token_rows(1, 12))))
