"""GPTQ's two loops: the scale search against brute force, the column loop against the identity it must fulfil; in plain torch,
by the kernels of every instruction set, and by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from llmopt import native
from llmopt.env import ISA_NAMES
from llmopt.ops import device
from llmopt.ops.gptq_round import reference, round_span, search_scales

IMPLEMENTATIONS = ["reference", "triton", *([] if not native.available() else ISA_NAMES)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Plain torch, then the kernels on every instruction set of this processor."""
    if request.param == "triton":
        if not pytest.importorskip("triton").knobs.runtime.interpret:
            pytest.skip("TRITON_INTERPRET is not 1")
        with device.interpreting():
            yield request.param
        return
    if request.param == "reference":
        monkeypatch.setattr(native, "available", lambda: False)
        yield request.param
        return
    if request.param not in request.config.llmopt_isas:  # type: ignore[attr-defined]
        pytest.skip(f"this processor has no {request.param}")
    native.force_isa(request.param)
    try:
        yield request.param
    finally:
        native.force_isa("auto")


def weights(b: int, n: int, s: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, s, generator=torch.Generator().manual_seed(seed))


def weighted_error(
    w: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """``[b, N]`` float64: error of the nearest codes under this scale."""
    w, scale, zero = w.double(), scale.double()[..., None], zero.double()[..., None]
    codes = (w / scale + zero).round().clamp(0, 2**bits - 1)
    return (((codes - zero) * scale - w).square() * importance.double()[:, None]).sum(-1)


SIZES = [(1, 1, 1), (1, 16, 32), (2, 17, 33), (3, 5, 128), (1, 40, 200), (2, 33, 64)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_candidate_is_better(
    size: tuple[int, int, int], bits: int, symmetric: bool, implementation: str, nan_memory: None
) -> None:
    b, n, s = size
    w = weights(b, n, s) + (0.0 if symmetric else 0.5)
    importance = torch.rand(b, s, generator=torch.Generator().manual_seed(1)) ** 4
    scale, zero = search_scales(w, importance, bits=bits, symmetric=symmetric)
    top = 2**bits - 1
    assert scale.shape == zero.shape == (b, n)
    assert torch.equal(scale, scale.half().float())
    assert (scale != 0).all()
    assert torch.equal(zero, zero.round().clamp(0, top))
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if symmetric:
        assert (zero == 2 ** (bits - 1)).all()
        cover = 2 * torch.maximum(-low, high) / top
    else:
        assert (scale > 0).all()
        cover = (high - low) / top
    chosen = weighted_error(w, importance, scale, zero, bits)
    for share in reference.SHRINKS:
        for sign in (1, -1) if symmetric else (1,):
            candidate = (cover * share * sign).half().float()
            candidate = torch.where(candidate == 0, torch.full_like(candidate, 2.0**-24), candidate)
            error = weighted_error(w, importance, candidate, zero, bits)
            # codes at a tie may fall either way between float32 and float64
            assert (chosen <= error * (1 + 1e-4) + 1e-12).all(), (share, sign)


def test_importance_decides_which_weights_are_met(implementation: str) -> None:
    w = torch.tensor([[[0.1, 0.2, 0.3, 4.0]]])
    small, _ = search_scales(w, torch.tensor([[1.0, 1.0, 1.0, 1e-6]]), bits=4, symmetric=True)
    large, _ = search_scales(w, torch.tensor([[1e-6, 1e-6, 1e-6, 1.0]]), bits=4, symmetric=True)
    assert abs(float(small)) < abs(float(large))
    assert float(large) == pytest.approx(-4 / 8, rel=1e-2)  # codes reach one step further down than up


def test_a_group_of_zeros_keeps_the_smallest_scale(implementation: str) -> None:
    for symmetric in (True, False):
        scale, zero = search_scales(torch.zeros(1, 20, 32), torch.ones(1, 32), bits=4, symmetric=symmetric)
        assert torch.equal(scale.abs(), torch.full((1, 20), 2.0**-24))
        codes, errors = round_span(torch.zeros(1, 20, 32), torch.eye(32)[None], scale, zero, bits=4)
        assert torch.equal(codes, zero[..., None].expand_as(codes))
        assert not errors.any()


def test_columns_without_importance_do_not_count(implementation: str) -> None:
    w = weights(1, 9, 24)
    mask = torch.ones(1, 24)
    mask[:, 10:] = 0
    # the solver hands groups over like this: what is outside is zero and weighs nothing
    padded, _ = search_scales(w * mask[:, None], mask, bits=4, symmetric=True)
    alone, _ = search_scales(w[..., :10].contiguous(), torch.ones(1, 10), bits=4, symmetric=True)
    assert torch.equal(padded, alone)


def factor(b: int, s: int, seed: int = 2) -> torch.Tensor:
    x = torch.randn(b, 3 * s, s, generator=torch.Generator().manual_seed(seed))
    h = x.transpose(1, 2) @ x / (3 * s) + 0.05 * torch.eye(s)
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True).contiguous()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 16, 32), (2, 17, 33), (3, 5, 128), (1, 33, 127)], ids=str)
def test_errors_account_for_every_difference(
    size: tuple[int, int, int], bits: int, implementation: str, nan_memory: None
) -> None:
    b, n, s = size
    w, u = weights(b, n, s, 3), factor(b, s)
    scale, zero = search_scales(w, torch.ones(b, s), bits=bits, symmetric=False)
    codes, errors = round_span(w, u, scale, zero, bits=bits)
    assert torch.equal(codes, codes.round().clamp(0, 2**bits - 1))
    dequantized = (codes - zero[..., None]) * scale[..., None]
    # each column is rounded after all errors before it were spread over it: w - dq = errors @ U
    torch.testing.assert_close(w - dequantized, errors @ u, rtol=1e-4, atol=1e-5)
    # and each code is the nearest one to the weight it then had
    seen = dequantized + errors * torch.diagonal(u, dim1=1, dim2=2)[:, None]
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert (((seen - dequantized).abs() <= 0.5001 * scale[..., None]) | ~inside).all()


def test_kernels_and_reference_choose_alike(implementation: str) -> None:
    w, u = weights(2, 64, 128, 4), factor(2, 128)
    importance = torch.diagonal(u, dim1=1, dim2=2).pow(-2)
    for symmetric in (True, False):
        scale, zero = search_scales(w, importance, bits=4, symmetric=symmetric)
        expected = reference.search_scales(w, importance, bits=4, symmetric=symmetric)
        assert torch.equal(zero, expected[1])
        assert (scale == expected[0]).float().mean() > 0.99
        ours, theirs = (weighted_error(w, importance, s, zero, 4) for s in (scale, expected[0]))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        codes, _ = round_span(w, u, scale, zero, bits=4)
        expected_codes, _ = reference.round_span(w, u, scale, zero, bits=4)
        # one weight on the edge between two codes moves what follows it in its row
        assert (codes == expected_codes).float().mean() > 0.995


def test_threads_do_not_change_a_bit(isa: str, threads: Callable[[int], None]) -> None:
    w, u = weights(3, 50, 96, 5), factor(3, 96)
    found = []
    for count in (1, 2):
        threads(count)
        scale, zero = search_scales(w, torch.ones(3, 96), bits=4, symmetric=True)
        found.append((scale, zero, *round_span(w, u, scale, zero, bits=4)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_written_around_the_outputs(isa: str) -> None:
    b, n, s = 2, 17, 31
    w, u = weights(b, n, s, 6), factor(b, s)
    scale, zero = search_scales(w, torch.ones(b, s), bits=4, symmetric=True)
    codes, errors = round_span(w, u, scale, zero, bits=4)
    small, large = torch.full((2, b * n + 14), 777.0), torch.full((2, b * n * s + 14), 777.0)
    out = [row[7:-7].view(b, n) for row in small] + [row[7:-7].view(b, n, s) for row in large]
    native.library().gptq_search_scales(w, torch.ones(b, s), out[0], out[1], 4, True)
    native.library().gptq_round_span(w, u, scale, zero, out[2], out[3], 4)
    assert all(torch.equal(a, b) for a, b in zip(out, (scale, zero, codes, errors), strict=True))
    for view in out:
        view.fill_(777.0)
    assert (small == 777.0).all()
    assert (large == 777.0).all()


def test_views_are_read_right(isa: str) -> None:
    w, u = weights(2, 20, 64, 7), factor(2, 128)
    scale, zero = search_scales(w[..., 16:48], torch.ones(2, 64)[:, 16:48], bits=4, symmetric=True)
    again = search_scales(w[..., 16:48].contiguous(), torch.ones(2, 32), bits=4, symmetric=True)
    assert torch.equal(scale, again[0])
    codes, _ = round_span(w[..., 16:48], u[:, 8:40, 8:40], scale, zero, bits=4)
    expected, _ = round_span(w[..., 16:48].contiguous(), u[:, 8:40, 8:40].contiguous(), scale, zero, bits=4)
    assert torch.equal(codes, expected)


def test_bad_calls_name_the_argument(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference checks nothing")
    w, ones = weights(2, 5, 32), torch.ones(2, 5)
    for call, named in (
        (lambda: search_scales(w[0], torch.ones(2, 32), bits=4, symmetric=True), "w"),
        (lambda: search_scales(w, torch.ones(2, 31), bits=4, symmetric=True), "weight"),
        (lambda: search_scales(w.double(), torch.ones(2, 32), bits=4, symmetric=True), "w"),
        (lambda: search_scales(w, torch.ones(2, 32), bits=9, symmetric=True), "bits"),
        (lambda: round_span(weights(2, 5, 129), factor(2, 129), ones, ones, bits=4), "w"),
        (lambda: round_span(w, factor(2, 31), ones, ones, bits=4), "u"),
        (lambda: round_span(w, factor(2, 32), ones[:, :4], ones, bits=4), "scale"),
        (lambda: round_span(w, factor(2, 32), ones, ones[:1], bits=4), "zero"),
        (lambda: round_span(w, factor(2, 32), ones, ones, bits=40), "bits"),
    ):
        with pytest.raises(ValueError, match=rf"^{named}: "):
            call()
