"""moe in plain torch: the truth for tests and benchmarks."""

from __future__ import annotations

import torch

from llmopt.ops.int4_linear import reference


def route(
    logits: torch.Tensor, correction_bias: torch.Tensor | None, choice: list[int], weighting: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts ``[T, k]``, best first, and their weights, float32; options as ``Routing`` gives them."""
    top_k, sigmoid, n_group, topk_group, group_best = choice
    renormalize, sum_eps, sum_min, scale = weighting
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    wanted = scores if correction_bias is None else scores + correction_bias
    if topk_group < n_group:
        groups = wanted.unflatten(-1, (n_group, -1))
        best = groups.topk(group_best, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        open_ = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter_(-1, best, True)
        wanted = groups.masked_fill(~open_[..., None], -torch.inf).flatten(-2)
    index = wanted.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, index)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + sum_eps).clamp(min=sum_min)
    return index, weights * scale


def block(
    h: torch.Tensor, norm: torch.Tensor, router: torch.Tensor, correction_bias: torch.Tensor | None,
    gate_up: torch.Tensor, down: torch.Tensor, shared_gate: torch.Tensor | None, shared_up: torch.Tensor | None,
    shared_down: torch.Tensor | None, eps: float, sizes: list[int], shared_sizes: list[int], choice: list[int],
    weighting: list[float],
) -> torch.Tensor:  # fmt: skip
    """Loop over tokens and choices; activations quantized before each packed product, everything else fp32."""
    x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * norm
    index, weights = route(x @ router.float().T, correction_bias, choice, weighting)
    inner = sizes[0]
    out = h.clone()
    for t in range(h.shape[0]):
        row = x[t : t + 1]
        if shared_gate is not None and shared_up is not None and shared_down is not None:
            s = shared_sizes[0]
            gate, up = linear(row, shared_gate, s, shared_sizes, 1), linear(row, shared_up, s, shared_sizes, 1)
            act = torch.nn.functional.silu(gate) * up
            out[t] += linear(act, shared_down, h.shape[1], shared_sizes, 2)[0]
        for e, weight in zip(index[t].tolist(), weights[t], strict=True):
            both = linear(row, gate_up[e], 2 * inner, sizes, 1)
            act = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]
            out[t] += weight * linear(act, down[e], h.shape[1], sizes, 2)[0]
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, rows: int, sizes: list[int], group_at: int) -> torch.Tensor:
    """``x @ weight.T`` with a packed weight or one of a floating dtype; ``sizes[group_at]`` is its group size."""
    if weight.dtype != torch.uint8:
        return x @ weight.float().T
    return reference.linear(
        x, weight, None, out_features=rows, group_size=sizes[group_at], asymmetric=bool(sizes[4]), bits=sizes[3]
    )
