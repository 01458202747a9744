"""GPTQ of fused experts: one Hessian an expert, solved in batches, starved experts made up from the layer's other tokens.

A token counts with the square of its router weight, because that is how an expert's error reaches the block's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmopt.models.base import ExpertsSite
from llmopt.ops.int4_linear import layout
from llmopt.packed import QuantExperts, kernel_group_size, spread_scales
from llmopt.passes.quantize_gptq.rounding import Grid
from llmopt.passes.quantize_gptq.sequential import RoutedTokens
from llmopt.passes.quantize_gptq.solver import Solution, solve

# bytes of Hessians held at once; decides how many experts are solved together
_HESSIAN_BYTES = 256 << 20


@dataclass(slots=True)
class ExpertsResult:
    """Quantized experts, a float stand-in for calibrating what follows, and what the receipt says of them."""

    module: QuantExperts
    gate_up: torch.Tensor  # [E, 2I, H] dequantized, model dtype
    down: torch.Tensor  # [E, H, I]
    loss: float
    damp: float
    tokens: list[int]  # calibration tokens an expert
    starved: list[int]  # experts below the minimum


@dataclass(frozen=True, slots=True)
class _Share:
    """The calibration inputs one expert is solved on: rows, what they should have been, and their weights."""

    x: torch.Tensor  # [n, K]
    exact: torch.Tensor  # [n, K]
    weight: torch.Tensor  # [n, 1]


def solve_experts(
    site: ExpertsSite, seen: RoutedTokens, *, grid: Grid, group_size: int, damp: float, min_tokens: int, seed: int
) -> ExpertsResult:
    """Quantize all experts of one layer.

    Args:
        site: the fused experts.
        seen: what the router sent them during calibration.
        grid, group_size, damp: as in :func:`solver.solve`.
        min_tokens: an expert with fewer tokens is starved: tokens of the same layer, drawn with ``seed``, fill it up to
            this number with the layer's mean router weight.

    Raises:
        QuantizationError: names the layer.
    """
    hidden, index = seen.hidden, seen.index
    num_experts, _, inner = site.down.shape
    counts = torch.bincount(index.flatten(), minlength=num_experts)[:num_experts].tolist()
    generator = torch.Generator().manual_seed(seed)
    dtype = site.gate_up.dtype
    gate_up_dq, down_dq = torch.empty_like(site.gate_up), torch.empty_like(site.down)
    packed: dict[str, list[torch.Tensor]] = {"gate_up": [], "down": []}
    loss, used = 0.0, 0.0
    per_batch = max(1, _HESSIAN_BYTES // (4 * max(hidden.shape[1], inner) ** 2))
    for start in range(0, num_experts, per_batch):
        batch = slice(start, min(start + per_batch, num_experts))
        shares = [_share(e, seen, min_tokens, generator) for e in range(batch.start, batch.stop)]
        name = f"{site.name}[{batch.start}:{batch.stop}]"
        options = {"grid": grid, "group_size": group_size, "damp": damp}
        up = solve(site.gate_up[batch], *_moments(shares), name=f"{name}.{site.spec.gate_up}", **options)  # type: ignore[arg-type]
        gate_up_dq[batch] = up.dequantized(group_size).to(dtype)
        pairs = zip(shares, gate_up_dq[batch], site.gate_up[batch], strict=True)
        inner_shares = [_after_gate(share, quantized, exact) for share, quantized, exact in pairs]
        down = solve(site.down[batch], *_moments(inner_shares), name=f"{name}.{site.spec.down}", **options)  # type: ignore[arg-type]
        down_dq[batch] = down.dequantized(group_size).to(dtype)
        packed["gate_up"].append(_pack(up, group_size))
        packed["down"].append(_pack(down, group_size))
        loss += float(up.loss.sum() + down.loss.sum())
        used = max(used, up.damp, down.damp)
    module = QuantExperts(
        torch.cat(packed["gate_up"]), torch.cat(packed["down"]), hidden_dim=hidden.shape[1], intermediate_dim=inner,
        group_size=group_size, asymmetric=not grid.symmetric,
    )  # fmt: skip
    starved = [e for e, n in enumerate(counts) if n < min_tokens]
    return ExpertsResult(module, gate_up_dq, down_dq, loss, used, counts, starved)


def _share(expert: int, seen: RoutedTokens, min_tokens: int, generator: torch.Generator) -> _Share:
    token, choice = torch.where(seen.index == expert)
    weight = seen.weights[token, choice]
    missing = min(min_tokens, seen.hidden.shape[0]) - len(token)
    if missing > 0:
        # drawn on the CPU: the same tokens on every device
        extra = torch.randperm(seen.hidden.shape[0], generator=generator)[:missing].to(token.device)
        token = torch.cat([token, extra])
        weight = torch.cat([weight, seen.weights.mean().expand(missing)])
    return _Share(seen.hidden[token].float(), seen.exact[token].float(), weight[:, None])


def _moments(shares: list[_Share]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hessian and drift ``[b, K, K]``: weighted means of ``x x^T`` and ``(exact - x) x^T``, the latter shrunk."""
    hessians, drifts = [], []
    for share in shares:
        scaled = share.x * share.weight
        total = share.weight.square().sum().clamp(min=1e-12)
        tokens, size = share.x.shape
        hessians.append(scaled.T @ scaled / total)
        drifts.append(((share.exact - share.x) * share.weight).T @ scaled * (tokens / (tokens + size) / total))
    return torch.stack(hessians), torch.stack(drifts)


def _after_gate(share: _Share, quantized: torch.Tensor, exact: torch.Tensor) -> _Share:
    def activated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ gate_up.float().T).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    return _Share(activated(share.x, quantized), activated(share.exact, exact), share.weight)


def _pack(solution: Solution, group_size: int) -> torch.Tensor:
    k = solution.q.shape[-1]
    zeros = solution.zeros
    return layout.pack(
        solution.q, spread_scales(solution.scales, k, group_size),
        None if zeros is None else spread_scales(zeros, k, group_size),
        group_size=kernel_group_size(k, group_size), bits=4,
    )  # fmt: skip
