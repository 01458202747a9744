"""Multi-head latent attention on the latent ops: transformers' modules, ragged batches, recorded programs, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from llmopt import native
from llmopt.errors import InputError
from llmopt.models import deepseek_v2, deepseek_v3
from llmopt.ops.latent_attention import latent_attention
from llmopt.ops.latent_attention.spec import SPEC as ATTENTION
from llmopt.ops.latent_cache import absorbed_weights, expanded_attention, latent_cache, reference
from llmopt.ops.latent_cache.spec import SPEC
from llmopt.ops.latent_output import latent_output
from llmopt.ops.spec import Case

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

V2, V3 = deepseek_v2.FAMILY.tiny_config, deepseek_v3.FAMILY.tiny_config
CONFIGS = {
    "v2": lambda: v2.DeepseekV2Config(**copy.deepcopy(V2)),
    "v2_q_lora_yarn": lambda: v2.DeepseekV2Config(
        **copy.deepcopy({**V2, "q_lora_rank": 48, "rope_scaling": V3["rope_scaling"]})
    ),
    "v3_yarn": lambda: v3.DeepseekV3Config(**copy.deepcopy(V3)),
    "v3_halves_no_q_lora": lambda: v3.DeepseekV3Config(
        **copy.deepcopy({**V3, "q_lora_rank": None, "rope_interleave": False, "rope_scaling": None})
    ),
}


class Layer:
    """A transformers attention module and what the latent ops need of it."""

    def __init__(self, name: str, *, sequences: int = 2, dtype: torch.dtype = torch.float32,
                 weights: torch.dtype = torch.float32) -> None:  # fmt: skip
        torch.manual_seed(0)
        config = CONFIGS[name]()
        config._attn_implementation = "eager"
        code, kind = (v2, "DeepseekV2") if name.startswith("v2") else (v3, "DeepseekV3")
        self.config = config
        self.module: Any = getattr(code, f"{kind}Attention")(config, 0).eval()
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 2 else 0.2)
        self.rotary: Any = getattr(code, f"{kind}RotaryEmbedding")(config)
        self.interleaved = bool(getattr(config, "rope_interleave", True))
        angles = self.rotary(torch.zeros(1), torch.arange(256)[None])
        parts = (angles.real, angles.imag) if isinstance(angles, torch.Tensor) else angles
        half = config.qk_rope_head_dim // 2
        self.cos, self.sin = (x[0, :, :half].contiguous() for x in parts)
        self.heads, self.nope, self.v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        self.rank, self.rope = config.kv_lora_rank, config.qk_rope_head_dim
        kv_b = self.module.kv_b_proj.weight.detach()
        self.w_uk, self.w_uv = absorbed_weights(kv_b, heads=self.heads, nope=self.nope, dtype=weights)
        self.cache = torch.full((sequences, 128, self.rank + self.rope), torch.nan, dtype=dtype)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The module over all of ``x [T, hidden]`` at once, before o_proj."""
        kept: list[torch.Tensor] = []
        hook = self.module.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
        tokens = x.shape[0]
        mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
        angles = self.rotary(x, torch.arange(tokens)[None])
        with torch.no_grad():
            self.module(x[None], position_embeddings=angles, attention_mask=mask)
        hook.remove()
        return kept[0]

    def projections(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = self.module
        with torch.no_grad():
            q = m.q_proj(x) if m.q_lora_rank is None else m.q_b_proj(m.q_a_layernorm(m.q_a_proj(x)))
            return q, m.kv_a_proj_with_mqa(x)

    def query(self, x: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor, *, absorbed: bool) -> torch.Tensor:
        q, kv_a = self.projections(x)
        norm = self.module.kv_a_layernorm
        return latent_cache(
            q, kv_a, norm.weight.detach(), eps=norm.variance_epsilon, cos=self.cos, sin=self.sin, position=slot,
            seq=seq, slot=slot, interleaved=self.interleaved, heads=self.heads, cache=self.cache,
            w_uk=self.w_uk if absorbed else None,
        )  # fmt: skip

    def absorbed(self, x: torch.Tensor, seq: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        query = self.query(x, seq, slot, absorbed=True)
        latent = latent_attention(query, self.cache, seq=seq, slot=slot, scale=self.module.scaling, rank=self.rank)
        return latent_output(latent, self.w_uv, v_dim=self.v)

    def expanded(self, x: torch.Tensor, seq: int, first: int, heads_at_once: int = 3) -> torch.Tensor:
        tokens = x.shape[0]
        query = self.query(x, *rows((seq, first, tokens)), absorbed=False)
        weight = self.module.kv_b_proj.weight.detach().view(self.heads, -1, self.rank)
        return expanded_attention(
            query, self.cache, lambda c, a, b: F.linear(c.float(), weight[a:b].flatten(0, 1)).to(c.dtype), seq=seq,
            keys=first + tokens, nope=self.nope, rope=self.rope, scale=self.module.scaling, heads_at_once=heads_at_once,
        )  # fmt: skip


def rows(*runs: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """seq and slot of runs ``(sequence, first slot, tokens)``."""
    flat = [(s, first + i) for s, first, count in runs for i in range(count)]
    return tuple(torch.tensor(column, dtype=torch.int32) for column in zip(*flat, strict=True))  # type: ignore[return-value]


def hidden(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, V2["hidden_size"], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_prefill_and_decode_equal_transformers(name: str, isa: str) -> None:
    layer, x = Layer(name), hidden(70)
    expected = layer.whole(x)
    got = [layer.expanded(x[:40], 0, 0), layer.expanded(x[40:60], 0, 40)]
    got += [layer.absorbed(x[60:67], *rows((0, 60, 7)))]
    got += [layer.absorbed(x[t : t + 1], *rows((0, t, 1))) for t in range(67, 70)]
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [torch.uint8, torch.bfloat16], ids=["int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_small_caches_and_weights_stay_close(dtype: torch.dtype, weights: torch.dtype) -> None:
    layer, x = Layer("v3_yarn", dtype=dtype, weights=weights), hidden(50)
    expected = layer.whole(x)
    layer.expanded(x[:49], 1, 0)
    got = layer.absorbed(x[49:], *rows((1, 49, 1)))
    error = (got - expected[49:]).norm() / expected[49:].norm()
    assert error < 0.02


def test_int8_weights_are_about_as_good_as_bf16_ones() -> None:
    g = torch.Generator().manual_seed(1)
    kv_b = torch.randn(4 * 256, 512, generator=g) * 512**-0.5
    q, latent = torch.randn(8, 4, 128, generator=g), torch.randn(8, 4, 512, generator=g)
    exact = absorbed_weights(kv_b, heads=4, nope=128, dtype=torch.float32)
    for dtype, most in ((torch.bfloat16, 3e-3), (torch.uint8, 1.2e-2)):
        w_uk, w_uv = absorbed_weights(kv_b, heads=4, nope=128, dtype=dtype)
        for x, got, want, n in ((q, w_uk, exact[0], 512), (latent, w_uv, exact[1], 128)):
            truth = reference.heads_linear(x, want, n).flatten(1)
            error = (latent_output(x, got, v_dim=n) - truth).norm() / truth.norm()
            assert error < most, (dtype, float(error))


def test_the_cache_gets_the_tokens_and_nothing_else(isa: str) -> None:
    for case in SPEC.cases:
        if case.real:
            continue
        inputs = SPEC.make_inputs(case, 3)
        expected = inputs["cache"].clone()
        names = ("kv_a", "norm", "eps", "cos", "sin", "position", "seq", "slot", "interleaved")
        reference.write_latents(**{k: inputs[k] for k in names}, cache=expected)
        latent_cache(**inputs)
        torch.testing.assert_close(inputs["cache"], expected, rtol=1e-5, atol=1e-5, msg=case.name)


def test_company_in_the_batch_changes_no_bit(isa: str) -> None:
    g = torch.Generator().manual_seed(4)
    query, cache = torch.randn(5, 20, 80, generator=g), torch.randn(3, 1000, 80, generator=g)
    seq, slot = rows((2, 64, 1), (0, 990, 3), (1, 5, 1))

    def attend(first: int, last: int) -> torch.Tensor:
        some = slice(first, last)
        return latent_attention(query[some], cache, seq=seq[some], slot=slot[some], scale=0.1, rank=64)

    assert torch.equal(attend(0, 5), torch.cat([attend(0, 1), attend(1, 4), attend(4, 5)]))


def test_a_recorded_step_equals_the_direct_one(isa: str, threads: Callable[[int], None]) -> None:
    layer, x = Layer("v2", weights=torch.uint8), hidden(80)
    layer.expanded(x[:60], 0, 0), layer.expanded(x[:7], 1, 0)
    library, norm = native.library(), layer.module.kv_a_layernorm
    q, kv_a = (t.clone() for t in layer.projections(x[:2]))
    seq, slot = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([60, 7], dtype=torch.int32)
    for count in (1, 2):
        threads(count)
        library.record_begin()
        query = latent_cache(
            q, kv_a, norm.weight.detach(), eps=norm.variance_epsilon, cos=layer.cos, sin=layer.sin, position=slot, seq=seq,
            slot=slot, interleaved=layer.interleaved, heads=layer.heads, w_uk=layer.w_uk, cache=layer.cache,
        )  # fmt: skip
        latent = latent_attention(query, layer.cache, seq=seq, slot=slot, scale=layer.module.scaling, rank=layer.rank)
        out = latent_output(latent, layer.w_uv, v_dim=layer.v)
        step = library.record_end()["run"]
        for now in ([60, 7], [61, 8], [100, 0], [62, 9]):
            slot.copy_(torch.tensor(now, dtype=torch.int32))
            layer.cache[:, 61:] = layer.cache[:, :1]
            step(1)
            before = out.clone()
            assert torch.equal(before, layer.absorbed(x[:2], seq, slot)), now


def test_what_a_token_does_not_see_may_be_anything(isa: str) -> None:
    g = torch.Generator().manual_seed(2)
    query, cache = torch.randn(3, 20, 80, generator=g), torch.randn(1, 60, 80, generator=g)
    seq, slot = rows((0, 50, 3))
    expected = latent_attention(query, cache, seq=seq, slot=slot, scale=0.1, rank=64)
    cache[0, 51:] = torch.nan
    got = latent_attention(query, cache, seq=seq, slot=slot, scale=0.1, rank=64)
    assert torch.equal(got[0], expected[0])
    assert got[1:].isnan().all()


def rounding(cache: torch.Tensor) -> float:
    """A weight is rounded to bfloat16, by at most 2^-9 of it."""
    return 2**-9 * float(cache.float().nan_to_num().abs().max())


@pytest.mark.parametrize("case", [c for c in ATTENTION.cases if not c.real], ids=lambda c: c.name)
def test_products_of_bf16_agree_with_the_reference(case: Any, products: str) -> None:
    inputs = ATTENTION.make_inputs(Case(case.name, {**case.params, "dtype": torch.bfloat16}), 5)
    expected = ATTENTION.reference(**inputs)
    torch.testing.assert_close(ATTENTION.run(**inputs), expected, rtol=1e-5, atol=rounding(inputs["cache"]))


@pytest.mark.parametrize("case", [c for c in ATTENTION.cases if not c.real], ids=lambda c: c.name)
def test_float32_products_of_a_bf16_cache_are_as_good_as_of_float32(case: Any, isa: str) -> None:
    if isa == "amx":
        pytest.skip("its products are of bfloat16")
    native.library().force_bf16_dots("off")
    try:
        inputs = ATTENTION.make_inputs(Case(case.name, {**case.params, "dtype": torch.bfloat16}), 5)
        rtol, atol = ATTENTION.tolerance[torch.float32]
        torch.testing.assert_close(ATTENTION.run(**inputs), ATTENTION.reference(**inputs), rtol=rtol, atol=atol)
    finally:
        native.library().force_bf16_dots("auto")


@pytest.mark.parametrize(("rank", "rope"), [(64, 16), (64, 64), (512, 64), (37, 6)])
def test_bf16_products_see_no_hidden_key(rank: int, rope: int, products: str) -> None:
    g = torch.Generator().manual_seed(2)
    query, cache = (
        torch.randn(*size, generator=g).bfloat16() for size in ((3, 20, rank + rope), (1, 400, rank + rope))
    )
    seq, slot = rows((0, 300, 3))
    call = {"seq": seq, "slot": slot, "scale": 0.1, "rank": rank}
    expected = latent_attention(query, cache, **call)
    cache[0, 303:] = torch.nan
    assert torch.equal(latent_attention(query, cache, **call), expected)
    cache[0, 301:] = torch.nan
    got = latent_attention(query, cache, **call)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=rounding(cache))
    assert got[1:].isnan().all()


def test_bf16_products_do_not_depend_on_threads_or_company(products: str, threads: Callable[[int], None]) -> None:
    g = torch.Generator().manual_seed(4)
    query, cache = torch.randn(5, 20, 96, generator=g).bfloat16(), torch.randn(3, 1000, 96, generator=g).bfloat16()
    seq, slot = rows((2, 64, 1), (0, 990, 3), (1, 5, 1))
    parts = []
    for count, pieces in ((1, [(0, 5)]), (2, [(0, 5)]), (3, [(0, 1), (1, 4), (4, 5)]), (5, [(0, 4), (4, 5)])):
        threads(count)
        parts.append(torch.cat([
            latent_attention(query[a:b], cache, seq=seq[a:b], slot=slot[a:b], scale=0.1, rank=64) for a, b in pieces
        ]))  # fmt: skip
    assert all(torch.equal(part, parts[0]) for part in parts)


def bad(**change: Any) -> dict[str, Any]:
    case = next(c for c in SPEC.cases if c.name == "tokens_2")
    return {**SPEC.make_inputs(case, 0), **change}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(2, 143)}, "q"),
        ({"q": torch.zeros(3, 144)}, "kv_a"),
        ({"kv_a": torch.zeros(2, 81)}, "kv_a"),
        ({"kv_a": torch.zeros(2, 80, dtype=torch.bfloat16)}, "float32"),
        ({"norm": torch.zeros(63)}, "norm"),
        ({"cos": torch.zeros(50, 7)}, "sin"),
        ({"cache": torch.zeros(2, 7, 80, dtype=torch.float64)}, "cache"),
        ({"cache": torch.zeros(2, 80, 7).transpose(1, 2)}, "cache"),
        ({"seq": torch.zeros(2, dtype=torch.int64)}, "int32"),
        ({"w_uk": torch.zeros(3, 64, 31)}, "w_uk"),
        ({"w_uk": torch.zeros(3, 4, 5, dtype=torch.uint8)}, "w_uk"),
        ({"heads": 0}, "q"),
        ({"heads": 100}, "q"),
    ],
)
def test_bad_input_of_latent_cache_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        latent_cache(**bad(**change))


@pytest.mark.parametrize("name", ["position", "seq", "slot"])
@pytest.mark.parametrize("value", [-1, 1000])
def test_rows_outside_are_refused(name: str, value: int) -> None:
    with pytest.raises(IndexError, match=name):
        latent_cache(**bad(**{name: torch.full((2,), value, dtype=torch.int32)}))


def test_bad_input_of_attention_and_output_is_refused() -> None:
    query, cache, (seq, slot) = torch.zeros(1, 4, 80), torch.zeros(1, 9, 80), rows((0, 3, 1))
    for change in (
        {"query": torch.zeros(1, 4, 79)}, {"query": torch.zeros(4, 80)}, {"query": query.half()}, {"rank": 81},
        {"rank": 0}, {"cache": torch.zeros(9, 80)}, {"seq": seq.long()}, {"slot": torch.zeros(2, dtype=torch.int32)},
    ):  # fmt: skip
        call = {"query": query, "cache": cache, "seq": seq, "slot": slot, "scale": 1.0, "rank": 64, **change}
        with pytest.raises(InputError):
            latent_attention(**call)
    with pytest.raises(IndexError):
        latent_attention(query, cache, seq=seq, slot=slot + 6, scale=1.0, rank=64)
    for latent, w_uv, v_dim in (
        (torch.zeros(4, 64), torch.zeros(4, 8, 64), 8), (torch.zeros(1, 4, 64), torch.zeros(4, 8, 63), 8),
        (torch.zeros(1, 4, 64), torch.zeros(3, 8, 64), 8), (torch.zeros(1, 4, 64), torch.zeros(4, 8, 64), 0),
    ):  # fmt: skip
        with pytest.raises(InputError):
            latent_output(latent, w_uv, v_dim=v_dim)
    with pytest.raises(InputError, match="kv_b"):
        absorbed_weights(torch.zeros(30, 8), heads=4, nope=2)
    with pytest.raises(InputError, match="dtype"):
        absorbed_weights(torch.zeros(32, 8), heads=4, nope=2, dtype=torch.int8)
    with pytest.raises(InputError, match="keys"):
        expanded_attention(torch.zeros(5, 4, 48), torch.zeros(1, 9, 80), lambda c, a, b: c, seq=0, keys=4, nope=32, rope=16,
                           scale=1.0)  # fmt: skip
