"""The solver of quantize_gptq: what GPTQ promises, beside rounding, on correlated inputs."""

from __future__ import annotations

import pytest
import torch

from llmopt import native
from llmopt.errors import QuantizationError
from llmopt.passes.quantize_gptq import solver
from llmopt.passes.quantize_gptq.rounding import Grid, round_to_nearest
from llmopt.passes.quantize_gptq.solver import Solution, solve

SYM, ASYM = Grid(4, True), Grid(4, False)
both_grids = pytest.mark.parametrize("grid", [SYM, ASYM], ids=["sym", "asym"])


def problem(b: int, n: int, k: int, *, tokens: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Hessian of correlated inputs with a few loud columns."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(b, n, k, generator=g)
    x = torch.randn(b, tokens or 4 * k, k, generator=g) @ (torch.randn(k, k, generator=g) / k**0.5)
    x[..., :: max(k // 5, 1)] *= 5
    return w, x.transpose(1, 2) @ x / x.shape[1]


def run(w: torch.Tensor, h: torch.Tensor, grid: Grid = SYM, group: int = 64, damp: float = 0.01) -> Solution:
    return solve(w, h, grid=grid, group_size=group, damp=damp, name="the.layer")


def rtn(w: torch.Tensor, grid: Grid, group: int, *, search: bool = False) -> Solution:
    q, scales, zeros = round_to_nearest(w, grid, group, search=search)
    return Solution(q, scales, zeros, torch.zeros(w.shape[0]), 0.0)


def loss_of(solution: Solution, w: torch.Tensor, h: torch.Tensor, group: int) -> torch.Tensor:
    d = w.double() - solution.dequantized(group).double()
    return ((d @ h.double()) * d).sum((1, 2))


SHAPES = [
    (24, 128, 32),
    (16, 200, 64),
    (20, 130, 128),
    (12, 24, 128),
    (10, 96, -1),
    (5, 300, -1),
    (3, 1, 32),
    (7, 65, 64),
]


@both_grids
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_gptq_loses_less_than_rounding_and_reports_what_it_loses(n: int, k: int, group: int, grid: Grid) -> None:
    w, h = problem(2, n, k)
    solution = run(w, h, grid, group)
    groups = 1 if group == -1 else -(-k // group)
    assert solution.q.shape == w.shape
    assert solution.q.dtype == torch.uint8
    assert int(solution.q.max()) <= 15
    assert solution.scales.shape == (2, n, groups)
    assert solution.scales.dtype == torch.float16
    assert (solution.scales != 0).all()
    assert (solution.zeros is None) == grid.symmetric
    loss = loss_of(solution, w, h, group)
    torch.testing.assert_close(solution.loss.double(), loss, rtol=1e-3, atol=1e-6)
    for search in (False, True):
        # alone among its kind a single column leaves nothing to spread an error over
        assert (loss <= loss_of(rtn(w, grid, group, search=search), w, h, group) * (1.05 if k == 1 else 1.0)).all()


@both_grids
@pytest.mark.parametrize(("k", "group"), [(256, 64), (200, 64), (96, -1), (130, 128)])
def test_a_batch_is_solved_as_its_members_alone(k: int, group: int, grid: Grid) -> None:
    w, h = problem(4, 18, k, seed=1)
    together = run(w, h, grid, group)
    for i in range(4):
        alone = run(w[i : i + 1], h[i : i + 1], grid, group)
        assert (alone.q[0] == together.q[i]).float().mean() > 0.99
        torch.testing.assert_close(alone.loss[0], together.loss[i], rtol=0.01, atol=1e-6)


@both_grids
@pytest.mark.parametrize("k", [256, 210])
def test_scales_belong_to_contiguous_groups(k: int, grid: Grid) -> None:
    w, _ = problem(1, 8, k, seed=2)
    columns = torch.arange(k)
    w = w * 10.0 ** (columns // 64)
    # columns are visited out of order, and must not change groups for it
    h = torch.diag_embed(torch.rand(1, k, generator=torch.Generator().manual_seed(0)) * (columns + 1))
    solution = run(w, h, grid, 64)
    size = solution.scales.abs().float().mean((0, 1))
    assert (size[1:] > 5 * size[:-1]).all()
    d = (solution.dequantized(64) - w).abs()
    for group in range(solution.scales.shape[-1]):
        inside = columns // 64 == group
        assert d[..., inside].mean() < 0.3 * w[..., inside].abs().mean(), group


def test_without_correlation_gptq_is_rounding_with_searched_scales() -> None:
    w, _ = problem(2, 20, 192, seed=3)
    solution = run(w, torch.eye(192).expand(2, -1, -1).contiguous(), SYM, 64)
    expected = rtn(w, SYM, 64, search=True)
    assert torch.equal(solution.scales, expected.scales)
    assert torch.equal(solution.q, expected.q)


@both_grids
@pytest.mark.parametrize("batch", [1, 3])
def test_drift_moves_the_output_towards_that_of_the_exact_inputs(batch: int, grid: Grid) -> None:
    g = torch.Generator().manual_seed(7)
    w, _ = problem(batch, 24, 128, seed=7)
    exact = torch.randn(batch, 4000, 128, generator=g)
    # the path before has mixed the channels a little
    x = exact @ (torch.eye(128) + 0.02 * torch.randn(batch, 128, 128, generator=g))
    h, drift = x.mT @ x / 4000, (exact - x).mT @ x / 4000

    def error(solution: Solution) -> torch.Tensor:
        return (x @ solution.dequantized(64).mT - exact @ w.mT).square().mean((1, 2))

    plain = run(w, h, grid)
    made_up_for = solve(w, h, drift, grid=grid, group_size=64, damp=0.01, name="layer")
    assert (error(made_up_for) < 0.5 * error(plain)).all()
    without = solve(w, h, torch.zeros_like(h), grid=grid, group_size=64, damp=0.01, name="layer")
    assert torch.equal(without.q, plain.q)
    assert torch.equal(without.scales, plain.scales)


@both_grids
def test_dead_inputs_leave_their_columns_to_rounding(grid: Grid) -> None:
    w, h = problem(2, 16, 128, seed=4)
    dead = torch.arange(0, 128, 3)
    h[:, dead] = 0
    h[:, :, dead] = 0
    solution = run(w, h, grid, 32)
    assert solution.damp == 0.01
    d = (solution.dequantized(32) - w).abs()
    spread = solution.scales.float().abs().repeat_interleave(32, -1)
    # half a step, unless the scale was chosen to clip
    assert (d[..., dead] <= 0.51 * spread[..., dead]).float().mean() > 0.9
    assert (loss_of(solution, w, h, 32) <= loss_of(rtn(w, grid, 32), w, h, 32)).all()


def test_inputs_that_are_all_zero_are_rounded() -> None:
    w, _ = problem(1, 8, 64)
    solution = run(w, torch.zeros(1, 64, 64), SYM, 32)
    assert (solution.dequantized(32) - w).abs().max() < 0.6
    assert not solution.loss.any()


def test_weights_of_zero_stay_zero() -> None:
    _, h = problem(1, 8, 64)
    for grid in (SYM, ASYM):
        solution = run(torch.zeros(1, 8, 64), h, grid, 32)
        assert not solution.dequantized(32).any()
        assert not solution.loss.any()


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    w, h = problem(1, 16, 128, tokens=1)
    plenty = run(w, h, damp=0.01)
    assert plenty.damp == 0.01
    scarce = run(w, h, damp=1e-9)
    assert scarce.damp > 1e-9
    assert torch.isfinite(scarce.dequantized(64)).all()
    assert (loss_of(scarce, w, h, 64) <= loss_of(rtn(w, SYM, 64), w, h, 64)).all()


def test_a_hessian_that_no_damping_mends_names_the_layer() -> None:
    w, h = problem(1, 4, 32)
    with pytest.raises(QuantizationError, match=r"^the\.layer: Hessian is not positive definite"):
        run(w, -10 * h)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus_inf"])
def test_bad_numbers_name_the_layer(bad: float) -> None:
    w, h = problem(2, 8, 64)
    for target, says in ((w, "weight holds NaN or Inf"), (h, "Hessian holds NaN or Inf")):
        kept = target[1, 3, 5].clone()
        target[1, 3, 5] = bad
        with pytest.raises(QuantizationError, match=rf"^the\.layer: {says}"):
            run(w, h)
        target[1, 3, 5] = kept
    run(w, h)


def test_weights_beyond_float16_scales_are_refused_not_clipped() -> None:
    w, h = problem(1, 8, 64)
    w[0, 2, 7] = 1e5
    assert run(w, h).dequantized(64)[0, 2, 7] == pytest.approx(1e5, rel=0.01)
    w[0, 2, 7] = 1e7
    with pytest.raises(QuantizationError, match=r"^the\.layer: .*float16"):
        run(w, h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_weights_are_solved_in_float32(dtype: torch.dtype) -> None:
    w, h = problem(1, 12, 96)
    w = w.to(dtype)
    halves, floats = run(w, h), run(w.float(), h)
    assert torch.equal(halves.q, floats.q)
    assert torch.equal(halves.scales, floats.scales)


def test_the_solver_repeats_itself_bit_by_bit_and_leaves_its_inputs() -> None:
    w, h = problem(3, 20, 200)
    w0, h0 = w.clone(), h.clone()
    a, b = run(w, h, ASYM), run(w, h, ASYM)
    assert torch.equal(w, w0)
    assert torch.equal(h, h0)
    assert a.zeros is not None
    assert b.zeros is not None
    for x, y in ((a.q, b.q), (a.scales, b.scales), (a.zeros, b.zeros), (a.loss, b.loss)):
        assert torch.equal(x, y)


def test_kernels_and_plain_torch_solve_alike(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(2, 33, 200, seed=5)
    for grid in (SYM, ASYM):
        ours = run(w, h, grid)
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            plain = run(w, h, grid)
        torch.testing.assert_close(ours.loss, plain.loss, rtol=0.01, atol=0)
        assert (ours.scales == plain.scales).float().mean() > 0.97


def test_important_columns_come_first_inside_important_groups() -> None:
    diagonal = torch.tensor([[1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 4.0, 5.0, 6.0, 0.5]])
    order = solver._visiting_order(torch.diag_embed(diagonal), 3)
    assert order.tolist() == [[3, 4, 5, 8, 7, 6, 1, 2, 0, 9]]
    everything = solver._visiting_order(torch.diag_embed(diagonal), -1)
    assert everything.tolist() == [[3, 4, 5, 8, 7, 6, 1, 2, 0, 9]]


# ---- round to nearest


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_round_to_nearest_is_within_half_a_step(bits: int, symmetric: bool, group: int) -> None:
    w = torch.randn(3, 9, 200, generator=torch.Generator().manual_seed(6))
    q, scales, zeros = round_to_nearest(w, Grid(bits, symmetric), group)
    solution = Solution(q, scales, zeros, torch.zeros(3), 0.0)
    size = 200 if group == -1 else group
    step = scales.float().repeat_interleave(size, -1)[..., :200]
    zero = 2.0 ** (bits - 1) if zeros is None else zeros.float().repeat_interleave(size, -1)[..., :200]
    d = ((q.float() - zero) * step - w).abs()
    # the scale itself was rounded to float16, and a symmetric grid has one code fewer above zero
    assert (d <= step * (0.52 if symmetric and bits == 8 else 1.03)).all()
    assert (d <= 0.52 * step).float().mean() > 0.97
    assert solution.scales.shape == (3, 9, -(-200 // size))
