"""attention of many queries in bfloat16: the loops on AMX tiles and on vdpbf16ps, wherever the processor has them.

vdpbf16ps is chosen on some processors only, so it is forced here. ``tests/emulated_amx.h`` says how to run the loops on
tiles where there are none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmopt import native
from llmopt.ops.attention import attention, reference
from llmopt.ops.attention.spec import SPEC
from llmopt.ops.spec import Case, Inputs

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no compiled kernels"),
    pytest.mark.usefixtures("nan_memory", "products"),
]

SMALL = [case for case in SPEC.cases if not case.real]
RTOL, ATOL = SPEC.tolerance[torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def inputs_of(seed: int = 0, **params: Any) -> Inputs:
    return SPEC.make_inputs(Case("", {"h": 4, "hk": 2, "d": 64, **params, "dtype": torch.bfloat16}), seed)


def check(inputs: Inputs) -> None:
    torch.testing.assert_close(attention(**inputs), reference.attention(**inputs), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_of_the_spec(case: Case) -> None:
    check(SPEC.make_inputs(dataclasses.replace(case, params={**case.params, "dtype": torch.bfloat16}), 0))


@pytest.mark.parametrize("dim", [1, 31, 32, 33, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dim_v", [1, 47, 64, 128])
def test_head_sizes(dim: int, dim_v: int) -> None:
    check(inputs_of(d=dim, dv=dim_v, tq=45, tk=77))


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("tokens", [(33, 33), (70, 300), (150, 150)])
def test_groups_and_chunks(group: int, tokens: tuple[int, int]) -> None:
    check(inputs_of(h=2 * group, tq=tokens[0], tk=tokens[1]))


@pytest.mark.parametrize("tokens", [(32, 32), (100, 257), (200, 700), (40, 30), (600, 600)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5}, {"window": 100}, {"window": 300}])
@pytest.mark.parametrize("masks", [{}, {"key_mask": True}, {"mask": (2, 4)}, {"key_mask": True, "mask": (1, 1)}])
def test_masks(tokens: tuple[int, int], options: dict[str, Any], masks: dict[str, Any]) -> None:
    check(inputs_of(b=2, h=4, hk=1, d=32, tq=tokens[0], tk=tokens[1], **options, **masks))


@pytest.mark.parametrize("heads", [False, True], ids=["shared_rope", "rope_of_each_head"])
def test_latent_attention_sizes(heads: bool) -> None:
    check(inputs_of(h=4, hk=4, d=128, dv=128, rope=64, rope_heads=heads, tq=90, tk=150))
    check(inputs_of(h=2, hk=2, d=192, dv=128, tq=90, tk=90))


def test_more_packed_keys_than_are_held_at_a_time() -> None:
    """Twenty KV heads of 1.2 MB: they take turns."""
    check(inputs_of(h=20, hk=20, d=128, tq=40, tk=2400))


@pytest.mark.parametrize("size", [1e-30, 30.0, 1e18], ids=["tiny", "large", "huge"])
def test_scores_of_any_size(size: float) -> None:
    """The base of the weights starts anywhere and grows by leaps; no difference overflows."""
    q, k, v = normal(1, 2, 70, 32), normal(1, 2, 700, 32, seed=1), normal(1, 2, 700, 32, seed=2)
    k = k * torch.linspace(0.1, 1, 700)[:, None].bfloat16() * size
    want = reference.attention(q, k, v, scale=0.2)
    torch.testing.assert_close(attention(q, k, v, scale=0.2), want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scale_that_is_not_above_zero(scale: float) -> None:
    q, k, v = (normal(1, 2, 70, 32, seed=i) for i in range(3))
    want = reference.attention(q, k, v, scale=scale)
    torch.testing.assert_close(attention(q, k, v, scale=scale), want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_bad_key_reaches_only_rows_that_see_it(which: str, value: float) -> None:
    queries, bad, masked = 130, 128, 1
    q, k, v = (normal(2, 4, queries, 32, seed=i) for i in range(3))
    clean = {"k": k.clone(), "v": v.clone()}
    target = {"k": k, "v": v}[which]
    target[0, 2, bad, 7] = value
    target[:, :, masked, 3] = value
    key_mask = torch.ones(2, queries, dtype=torch.bool)
    key_mask[:, masked] = False
    out = attention(q, k, v, scale=0.2, key_mask=key_mask)
    want = reference.attention(q, clean["k"], clean["v"], scale=0.2, key_mask=key_mask)
    untouched = torch.ones(2, queries, 4, dtype=torch.bool)
    untouched[0, bad:, 2] = False
    torch.testing.assert_close(out[untouched], want[untouched], rtol=RTOL, atol=ATOL)
    if which == "v":
        assert not out[0, bad:, 2, 7].isfinite().any()
        others = torch.arange(32) != 7
        torch.testing.assert_close(out[0, bad:, 2, others], want[0, bad:, 2, others], rtol=RTOL, atol=ATOL)
    elif value != value:
        assert out[0, bad:, 2].isnan().all()


def test_nan_query_spoils_only_its_row() -> None:
    q, k, v = (normal(1, 4, 130, 32, seed=i) for i in range(3))
    want = attention(q, k, v, scale=0.2)
    q[0, 1, 1, 0] = float("nan")
    out = attention(q, k, v, scale=0.2)
    assert out[0, 1, 1].isnan().all()
    out[0, 1, 1] = want[0, 1, 1]
    assert torch.equal(out, want)


def test_row_that_sees_no_key_is_zero() -> None:
    q, k, v = normal(1, 2, 80, 32), normal(1, 2, 20, 32), normal(1, 2, 20, 32)
    out = attention(q, k, v, scale=1.0)
    assert (out[:, :60] == 0).all()
    assert (out[:, 60:] != 0).all()


def test_reads_and_writes_only_its_own() -> None:
    """Views at every offset of buffers full of NaN; the output stands between sentinels."""
    queries, keys, heads, dim, dim_v = 50, 61, 4, 20, 21
    for offset in range(0, 41, 5):
        views = []
        for i, (h, t, d) in enumerate([(heads, queries, dim), (2, keys, dim), (2, keys, dim_v)]):
            view = torch.full((2, h, t + 2, d + 50), float("nan")).bfloat16()[:, :, 1 : t + 1, offset : offset + d]
            views.append(view.copy_(normal(2, h, t, d, seed=i)))
        size = 2 * queries * heads * dim_v
        guarded = torch.full((size + 64,), 42.0).bfloat16()
        out = guarded[offset : offset + size].view(2, queries, heads, dim_v)
        native.library().attention(*views, None, None, None, None, 0.3, True, 0, out)
        torch.testing.assert_close(out, reference.attention(*views, scale=0.3), rtol=RTOL, atol=ATOL)
        assert (guarded[:offset] == 42).all()
        assert (guarded[offset + size :] == 42).all()


def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    inputs, results = inputs_of(b=2, tq=300, tk=400), []
    for count in (1, 2, 3):
        threads(count)
        results.append(attention(**inputs))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
