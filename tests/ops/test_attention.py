"""attention: against the reference on every instruction set, and what the reference cannot show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError, NativeLibraryError
from llmopt.ops.attention import attention, reference
from llmopt.ops.attention.spec import SPEC
from llmopt.ops.spec import Case

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no compiled kernels"),
    pytest.mark.usefixtures("nan_memory"),
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = [case for case in SPEC.cases if not case.real]
REAL = [case for case in SPEC.cases if case.real]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(case: Case, dtype: torch.dtype) -> None:
    inputs = SPEC.make_inputs(dataclasses.replace(case, params={**case.params, "dtype": dtype}), 0)
    rtol, atol = SPEC.tolerance[dtype]
    torch.testing.assert_close(attention(**inputs), reference.attention(**inputs), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_matches_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_published_shapes(case: Case, num_threads: int, threads: Callable[[int], None]) -> None:
    threads(num_threads)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("tokens", [(1, 3000), (3, 2000), (200, 200)], ids=["decode", "chunk", "prefill"])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_cut_of_the_work_agrees(
    tokens: tuple[int, int], num_threads: int, threads: Callable[[int], None], isa: str
) -> None:
    """One KV head: with more threads the keys are split, or there are more row tiles."""
    threads(num_threads)
    q, k, v = normal(1, 4, tokens[0], 32), normal(1, 1, tokens[1], 32, seed=1), normal(1, 1, tokens[1], 48, seed=2)
    key_mask = torch.rand(1, tokens[1], generator=torch.Generator().manual_seed(3)) > 0.5
    got = attention(q, k, v, scale=0.2, key_mask=key_mask)
    want = reference.attention(q, k, v, scale=0.2, key_mask=key_mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("queries", [1, 30], ids=["decode", "prefill"])
def test_reads_and_writes_only_its_own(queries: int, dtype: torch.dtype, isa: str) -> None:
    """Views at every offset of buffers full of NaN; the output stands between sentinels."""
    keys, heads, dim, dim_v = 37, 4, 20, 21
    for offset in range(0, 41, 5):
        views = []
        for i, (h, t, d) in enumerate([(heads, queries, dim), (2, keys, dim), (2, keys, dim_v)]):
            buffer = torch.full((2, h, t + 2, d + 50), float("nan"), dtype=dtype)
            view = buffer[:, :, 1 : t + 1, offset : offset + d]
            view.copy_(normal(2, h, t, d, seed=i))
            views.append(view)
        q, k, v = views
        size = 2 * queries * heads * dim_v
        guarded = torch.full((size + 64,), 42.0, dtype=dtype)
        out = guarded[offset : offset + size].view(2, queries, heads, dim_v)
        native.library().attention(q, k, v, None, None, None, None, 0.3, True, 0, out)
        rtol, atol = SPEC.tolerance[dtype]
        torch.testing.assert_close(out, reference.attention(q, k, v, scale=0.3), rtol=rtol, atol=atol)
        assert (guarded[:offset] == 42).all()
        assert (guarded[offset + size :] == 42).all()


def test_masks_may_be_strided_views_of_any_truth(isa: str) -> None:
    q, k, v = normal(2, 4, 5, 32), normal(2, 2, 70, 32, seed=1), normal(2, 2, 70, 32, seed=2)
    wide = torch.randint(0, 2, (2, 1, 9, 100), generator=torch.Generator().manual_seed(3), dtype=torch.uint8) * 255
    mask, key_mask = wide[:, :, 2:7, 11:81], wide[:, 0, 0, 20:90]
    got = attention(q, k, v, scale=0.2, mask=mask, key_mask=key_mask)
    want = reference.attention(q, k, v, scale=0.2, mask=mask, key_mask=key_mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_row_that_sees_no_key_is_zero(isa: str) -> None:
    q, k, v = normal(2, 2, 3, 16), normal(2, 2, 3, 16), normal(2, 2, 3, 16)
    key_mask = torch.tensor([[False, False, True], [False, False, False]])
    out = attention(q, k, v, scale=1.0, key_mask=key_mask)
    assert (out[0, :2] == 0).all()
    assert (out[0, 2] != 0).all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("queries", [5, 60, 130])
def test_bad_key_reaches_only_rows_that_see_it(queries: int, which: str, value: float, isa: str) -> None:
    """A bad key or value at a position that is masked out, or lies ahead of a query, has no influence."""
    bad, masked = queries - 2, 1
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
    torch.testing.assert_close(out[untouched], want[untouched], rtol=1e-5, atol=2e-5)
    if which == "v":
        assert not out[0, bad:, 2, 7].isfinite().any()
        others = torch.arange(32) != 7
        torch.testing.assert_close(out[0, bad:, 2, others], want[0, bad:, 2, others], rtol=1e-5, atol=2e-5)
    elif value != value:
        assert out[0, bad:, 2].isnan().all()


@pytest.mark.parametrize("queries", [2, 130])
def test_nan_query_spoils_only_its_row(queries: int, isa: str) -> None:
    q, k, v = (normal(1, 4, queries, 32, seed=i) for i in range(3))
    want = attention(q, k, v, scale=0.2)
    q[0, 1, 1, 0] = float("nan")
    out = attention(q, k, v, scale=0.2)
    assert out[0, 1, 1].isnan().all()
    out[0, 1, 1] = want[0, 1, 1]
    assert torch.equal(out, want)


@pytest.mark.parametrize("size", [1e4, 1e18], ids=["1e4", "1e18"])
def test_huge_scores_stay_finite(size: float, isa: str) -> None:
    """The largest score takes all the weight; neither a sum of weights nor a difference overflows."""
    q, k, v = normal(1, 2, 40, 32) * size, normal(1, 2, 40, 32, seed=1) * size, normal(1, 2, 40, 32, seed=2)
    want = reference.attention(q.double(), k.double(), v.double(), scale=0.2).float()
    torch.testing.assert_close(attention(q, k, v, scale=0.2), want, rtol=1e-4, atol=1e-4)


def test_last_query_of_a_prefill_equals_decode(isa: str) -> None:
    q, k, v = normal(1, 8, 90, 64), normal(1, 2, 90, 64, seed=1), normal(1, 2, 90, 64, seed=2)
    whole = attention(q, k, v, scale=0.125)
    step = attention(q[:, :, -1:], k, v, scale=0.125)
    torch.testing.assert_close(step[:, 0], whole[:, -1], rtol=1e-5, atol=1e-5)


def test_left_padding_equals_no_padding(isa: str) -> None:
    q, k, v = normal(1, 4, 50, 32), normal(1, 2, 50, 32, seed=1), normal(1, 2, 50, 32, seed=2)
    pad = [torch.cat([normal(1, x.shape[1], 13, 32, seed=9), x], 2) for x in (q, k, v)]
    key_mask = torch.arange(63)[None] >= 13
    padded = attention(*pad, scale=0.2, key_mask=key_mask)
    torch.testing.assert_close(padded[:, 13:], attention(q, k, v, scale=0.2), rtol=1e-5, atol=1e-5)


def test_value_may_be_a_view_of_the_key() -> None:
    k = normal(1, 1, 70, 48)
    q = normal(1, 8, 1, 48, seed=1)
    assert torch.equal(attention(q, k, k[..., :32], scale=0.2), attention(q, k, k[..., :32].clone(), scale=0.2))


def test_rope_part_equals_concatenation(isa: str) -> None:
    q, q_rope = normal(1, 4, 3, 32), normal(1, 4, 3, 16, seed=1)
    k, k_rope = normal(1, 1, 80, 32, seed=2), normal(1, 1, 80, 16, seed=3)
    split = attention(q, k, k, scale=0.2, q_rope=q_rope, k_rope=k_rope)
    whole = attention(torch.cat([q, q_rope], 3), torch.cat([k, k_rope], 3), k, scale=0.2)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


Q, K, V = normal(2, 4, 3, 32), normal(2, 2, 8, 32, seed=1), normal(2, 2, 8, 16, seed=2)
WRONG = {
    "q_dims": ({"q": Q[0]}, "q"),
    "q_dtype": ({"q": Q.double()}, "q"),
    "k_dtype": ({"k": K.bfloat16()}, "k"),
    "k_batch": ({"k": K[:1]}, "k"),
    "k_head_size": ({"k": K[..., :16]}, "k"),
    "k_heads": ({"k": normal(2, 3, 8, 32), "v": normal(2, 3, 8, 16)}, "k"),
    "k_empty": ({"k": K[:, :, :0], "v": V[:, :, :0]}, "k"),
    "k_strided": ({"k": K.transpose(2, 3).contiguous().transpose(2, 3)}, "k"),
    "v_tokens": ({"v": V[:, :, :7]}, "v"),
    "v_dims": ({"v": V[0]}, "v"),
    "window_zero": ({"window": 0}, "window"),
    "window_not_causal": ({"window": 4, "causal": False}, "window"),
    "key_mask_dtype": ({"key_mask": torch.ones(2, 8)}, "key_mask"),
    "key_mask_shape": ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, "key_mask"),
    "mask_shape": ({"mask": torch.ones(2, 2, 3, 8, dtype=torch.bool)}, "mask"),
    "mask_dtype": ({"mask": torch.zeros(1, 1, 3, 8)}, "mask"),
    "rope_alone": ({"q_rope": normal(2, 4, 3, 8)}, "k_rope"),
    "rope_size": ({"q_rope": normal(2, 4, 3, 8), "k_rope": normal(2, 1, 8, 4)}, "k_rope"),
    "rope_heads": ({"q_rope": normal(2, 4, 3, 8), "k_rope": normal(2, 4, 8, 8)}, "k_rope"),
}


@pytest.mark.parametrize(("change", "name"), WRONG.values(), ids=WRONG)
def test_wrong_input_names_the_argument(change: dict[str, object], name: str) -> None:
    inputs = {"q": Q, "k": K, "v": V, "scale": 0.2, **change}
    with pytest.raises(InputError, match=rf"attention: {name}: expected"):
        attention(**inputs)  # type: ignore[arg-type]


def test_refuses_to_lose_a_gradient() -> None:
    q = Q.clone().requires_grad_()
    with pytest.raises(InputError, match="no gradient"):
        attention(q, K, V, scale=0.2)
    with torch.no_grad():
        assert not attention(q, K, V, scale=0.2).requires_grad


def test_says_when_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NativeLibraryError("not part of this installation")

    monkeypatch.setattr(native, "library", missing)
    with pytest.raises(NativeLibraryError):
        attention(Q, K, V, scale=0.2)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"key_mask": torch.ones(2, 8, dtype=torch.bool)}])
def test_torch_library_registration(options: dict[str, object]) -> None:
    torch.library.opcheck(torch.ops.llmopt.attention.default, (Q, K, V, 0.2), options)
