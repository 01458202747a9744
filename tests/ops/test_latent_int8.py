"""The int8 latent cache: what latent_cache writes, what latent_attention reads, bad values and bad calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fenced
import pytest
import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.latent_attention import latent_attention
from llmopt.ops.latent_attention import reference as attention_reference
from llmopt.ops.latent_attention.spec import SPEC as ATTENTION
from llmopt.ops.latent_cache import latent_cache, latent_codes, latent_parts, reference
from llmopt.ops.latent_cache.spec import SPEC
from llmopt.ops.spec import Case, Inputs

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

# ranks and ropes that fill no whole vectors; an int8 row holds whole bfloat16
TAILS = [(38, 6), (80, 8), (200, 24)]
ATTENTION_CASES = [
    *(case for case in ATTENTION.cases if case.params.get("rank", 2) % 2 == 0),
    *(Case(f"rank_{r}_rope_{p}", {"heads": 5, "rank": r, "rope": p, "runs": [(0, 150, 2)]}) for r, p in TAILS),
]
WRITE_CASES = [
    *(case for case in SPEC.cases if not case.real and case.params["rank"] % 2 == 0),
    *(
        Case(f"rank_{r}_rope_{p}", {"heads": 2, "rank": r, "rope": p, "nope": 20, "v": 5, "tokens": 3})
        for r, p in TAILS
    ),
]
LITE = {"heads": 16, "rank": 512, "rope": 64}


@pytest.fixture(params=["on", "off"])
def byte_products(request: pytest.FixtureRequest, isa: str) -> Any:
    """Every instruction set; AVX-512 with the products of bytes and without."""
    library = native.library()
    if request.param == "on" and isa != "avx512":
        pytest.skip("it matters for AVX-512 alone")
    try:
        library.force_bf16_dots(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    library.force_bf16_dots("auto")


def attention_inputs(case: Case, seed: int = 0) -> Inputs:
    inputs = ATTENTION.make_inputs(case, seed)
    cache, scale = latent_codes(*inputs["cache"].float().tensor_split([inputs["rank"]], dim=-1))
    return {**inputs, "query": inputs["query"].bfloat16(), "cache": cache, "latent_scale": scale}


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_attention_is_that_of_the_reference(case: Case, byte_products: str) -> None:
    """Queries and weights of 8 bits: each off by at most half of a 127th or 255th of the largest."""
    inputs = attention_inputs(case)
    got, expected = latent_attention(**inputs), attention_reference.latent_attention(**inputs)
    assert off(got, expected) < 0.012
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03)


def test_a_few_large_scores_among_many_small_ones(byte_products: str) -> None:
    """One weight of nearly 1 leaves what lies below a 510th of it in its stretch of keys to rounding, and no more."""
    inputs = attention_inputs(Case("sink", {**LITE, "dtype": torch.bfloat16, "runs": [(0, 2047, 1)]}))
    inputs["query"] = inputs["query"] * 0.2
    rank = inputs["rank"]
    sink = inputs["query"][0].float().mean(0)
    rows, scales = latent_codes((60 * sink[:rank])[None], (60 * sink[rank:])[None])
    inputs["cache"][0, 3], inputs["latent_scale"][0, 3] = rows[0], scales[0]
    got, expected = latent_attention(**inputs), attention_reference.latent_attention(**inputs)
    assert off(got, expected) < 0.02


def test_without_scores_of_8_bits_it_is_exact(isa: str) -> None:
    library = native.library()
    if isa == "amx":
        pytest.skip("products of bytes")
    library.force_bf16_dots("off")
    try:
        for case in ATTENTION_CASES:
            inputs = attention_inputs(case)
            expected = attention_reference.latent_attention(**inputs)
            rank = inputs["rank"]
            # the reference rounds what it reads to bfloat16, as transformers' own layers get it
            exact = torch.cat(
                [
                    inputs["cache"][..., :rank] * inputs["latent_scale"][..., None],
                    latent_parts(inputs["cache"], inputs["latent_scale"], rank)[1].float(),
                ],
                -1,
            )
            plain = {**inputs, "cache": exact, "latent_scale": None, "query": inputs["query"].float()}
            got = latent_attention(**inputs)
            torch.testing.assert_close(got, attention_reference.latent_attention(**plain), rtol=1e-5, atol=2e-5)
            assert off(got, expected) < 4e-3
    finally:
        library.force_bf16_dots("auto")


def test_what_a_token_does_not_see_has_no_influence(byte_products: str) -> None:
    """Neither what is not finite behind it, nor in front of where its sequence starts."""
    inputs = attention_inputs(Case("some", {**LITE, "dtype": torch.bfloat16, "runs": [(0, 200, 3)]}))
    start = torch.tensor([7], dtype=torch.int32)
    before = latent_attention(**inputs, start=start)
    rank = inputs["rank"]
    for hidden in (slice(0, 7), slice(203, None)):
        inputs["cache"][0, hidden, :rank] = 127
        inputs["cache"][0, hidden, rank:].view(torch.bfloat16).fill_(torch.nan)
        inputs["latent_scale"][0, hidden] = torch.nan
    assert torch.equal(latent_attention(**inputs, start=start), before)
    # the second token's own key: the first does not see it
    inputs["latent_scale"][0, 201] = torch.nan
    after = latent_attention(**inputs, start=start)
    assert torch.equal(after[0], before[0])
    assert after[1:].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_what_is_not_finite_is_seen(bad: float, byte_products: str) -> None:
    inputs = attention_inputs(Case("some", {**LITE, "dtype": torch.bfloat16, "runs": [(0, 300, 1)]}))
    for change in ("latent_scale", "query"):
        changed = {**inputs, change: inputs[change].clone()}
        changed[change].view(-1)[5] = bad
        got = latent_attention(**changed)
        assert not got[0, 0].isfinite().any()
    alone = attention_inputs(Case("two_parts", {**LITE, "dtype": torch.bfloat16, "runs": [(0, 64, 1)]}))
    alone["latent_scale"][0, 64] = bad  # the only key of the second part
    assert not latent_attention(**alone).isfinite().any()
    zero = {**inputs, "query": torch.zeros_like(inputs["query"])}
    assert off(latent_attention(**zero), attention_reference.latent_attention(**zero)) < 0.012


def test_company_in_the_batch_and_threads_change_no_bit(byte_products: str, threads: Callable[[int], None]) -> None:
    inputs = attention_inputs(
        Case("ragged", {"heads": 20, "rank": 64, "rope": 16, "runs": [(2, 64, 1), (0, 990, 3), (1, 5, 1)]})
    )

    def attend(first: int, last: int) -> torch.Tensor:
        some = {k: inputs[k][first:last] for k in ("query", "seq", "slot")}
        return latent_attention(**{**inputs, **some})

    threads(2)
    whole = attend(0, 5)
    assert torch.equal(whole, torch.cat([attend(0, 1), attend(1, 4), attend(4, 5)]))
    threads(1)
    assert torch.equal(whole, attend(0, 5))


FENCED = """
import torch
from fenced import KEEP, fenced
from llmopt import native
from llmopt.ops.latent_attention import latent_attention
from llmopt.ops.latent_cache import latent_codes

torch.set_num_threads(1)
for rank, rope in ((64, 32), (128, 64), (40, 6)):
    for keys in (1, 31, 33, 128, 129):
        g = torch.Generator().manual_seed(keys)
        cache, scale = latent_codes(*torch.randn(1, keys, rank + rope, generator=g).tensor_split([rank], dim=-1))
        query = torch.randn(1, 5, rank + rope, generator=g).bfloat16()
        tensors = {"query": query, "cache": cache, "latent_scale": scale}
        rest = {"seq": torch.zeros(1).int(), "slot": torch.tensor([keys - 1]).int(), "scale": 0.1, "rank": rank}
        for isa in sys.argv[2:]:
            native.force_isa(isa)
            expected = latent_attention(**tensors, **rest)
            for at_end in (True, False):
                print(rank, keys, isa, at_end, flush=True)
                moved = {name: fenced(x, at_end=at_end) for name, x in tensors.items()}
                assert torch.equal(latent_attention(**moved, **rest), expected)
                KEEP.clear()
print("done", flush=True)
"""


def test_nothing_is_read_outside_the_tensors(request: pytest.FixtureRequest) -> None:
    fenced.run(FENCED, request.config.llmopt_isas)  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", WRITE_CASES, ids=lambda case: case.name)
def test_the_cache_gets_the_tokens_and_nothing_else(case: Case, isa: str) -> None:
    inputs = SPEC.make_inputs(case, 3)
    rank = inputs["norm"].shape[0]
    cache, scale = latent_codes(*inputs["cache"].tensor_split([rank], dim=-1))
    names = ("kv_a", "norm", "eps", "cos", "sin", "position", "seq", "slot", "interleaved")
    expected = cache.clone(), scale.clone()
    reference.write_latents(**{k: inputs[k] for k in names}, cache=expected[0], latent_scale=expected[1])
    given = {**inputs, "cache": cache, "latent_scale": scale}
    query = latent_cache(**given)
    torch.testing.assert_close(query, reference.latent_cache(**given), rtol=1.6e-2, atol=1e-2)
    torch.testing.assert_close(scale, expected[1], rtol=1e-5, atol=0)
    # a value may fall to the other side of a half
    difference = (cache[..., :rank].int() - expected[0][..., :rank].int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.sum()) <= 1 + difference.numel() // 1000
    rope, want = (latent_parts(rows, scale, rank)[1].float() for rows in (cache, expected[0]))
    torch.testing.assert_close(rope, want, rtol=8e-3, atol=1e-6)


def test_a_recorded_step_equals_the_direct_one(isa: str) -> None:
    inputs = SPEC.make_inputs(Case("step", {"tokens": 1, "nope": 32, "v": 16, "heads": 4, "rank": 64, "rope": 16}), 1)
    cache, scale = latent_codes(*inputs["cache"].tensor_split([64], dim=-1))
    rest = {"seq": inputs["seq"], "slot": inputs["slot"], "scale": 0.1, "rank": 64}

    def step(cache: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        query = latent_cache(**{**inputs, "cache": cache, "latent_scale": scale})
        return [query, latent_attention(query, cache, latent_scale=scale, **rest)]

    expected = [cache.clone(), scale.clone()]
    expected += step(*expected)
    library = native.library()
    library.record_begin()
    try:
        got = [cache, scale, *step(cache, scale)]
    finally:
        program = library.record_end()["run"]
    program(1)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_bad_calls_say_what_was_expected() -> None:
    inputs = attention_inputs(Case("some", {"heads": 4, "rank": 64, "rope": 16, "runs": [(0, 9, 1)]}))
    cache = inputs["cache"]
    for change, message in (
        ({"latent_scale": None}, "latent_scale: expected scales for an int8 cache, and for no other"),
        ({"latent_scale": torch.ones(1, 3)}, "latent_scale: expected"),
        ({"query": inputs["query"].float()}, "query: expected dtype bfloat16 beside an int8 cache"),
        ({"rank": 63}, "rank: expected whole bfloat16 behind it, got 33 bytes"),
        ({"rank": 97}, "rank: expected 1 to 96, got 97"),
        ({"cache": cache[..., :95].contiguous()}, "rank: expected whole bfloat16"),
        ({"cache": cache.bfloat16()}, "latent_scale: expected scales for an int8 cache, and for no other"),
    ):
        with pytest.raises(InputError, match=message):
            latent_attention(**{**inputs, **change})
    write = SPEC.make_inputs(Case("odd", {"tokens": 1, "nope": 8, "v": 8, "heads": 1, "rank": 7, "rope": 6}), 1)
    rows = torch.zeros(2, 5, 7 + 12, dtype=torch.int8)
    with pytest.raises(InputError, match="cache: expected an even number of bytes a row, got 19"):
        latent_cache(**{**write, "cache": rows, "latent_scale": torch.zeros(2, 5)})
