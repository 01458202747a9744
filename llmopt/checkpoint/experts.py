"""Routed experts, one packed linear each: for checkpoints that the fused kernel cannot hold.

The fused kernel has one set of settings and no column order of its own. Experts quantized in true activation order have
a permutation each, and other tools allow 8 bits or mixed settings: such a layer runs expert by expert. Same results,
slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llmopt.packed import QuantLinear


class ExpertLinears(nn.Module):
    """Stands where the fused experts module stood.

    Args:
        gate, up: an expert's linears ``[I, H]``.
        down: an expert's linear ``[H, I]``.
    """

    is_packed = True  # as QuantExperts': models.base.resolve then does not look for the 3-D parameters

    def __init__(self, gate: Sequence[QuantLinear], up: Sequence[QuantLinear], down: Sequence[QuantLinear]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.ModuleList(gate), nn.ModuleList(up), nn.ModuleList(down)
        self.num_experts = len(gate)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden_states [T, H]``, ``top_k_index [T, k]``, ``top_k_weights [T, k]`` to ``[T, H]``."""
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, choice = torch.where(top_k_index == expert)
            x = hidden_states[token]
            y = self.down[expert](nn.functional.silu(self.gate[expert](x)) * self.up[expert](x))
            out.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(out.dtype))
        return out

    def linears(self, expert: int) -> tuple[QuantLinear, QuantLinear, QuantLinear]:
        """One expert's linears: gate, up, down."""
        gate, up, down = self.gate[expert], self.up[expert], self.down[expert]
        assert isinstance(gate, QuantLinear)
        assert isinstance(up, QuantLinear)
        assert isinstance(down, QuantLinear)
        return gate, up, down
