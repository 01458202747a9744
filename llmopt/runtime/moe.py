"""The mixture-of-experts half of a decoder layer as one op: norm, router, routed and shared experts, residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llmopt.errors import UnsupportedModelError
from llmopt.models.base import ModelFamily, MoeSpec, ResolvedLayer
from llmopt.ops.device import by_triton
from llmopt.ops.moe import MOST_DENSE_TOKENS, Routing, SharedExperts, moe
from llmopt.packed import QuantExperts
from llmopt.runtime.blocks import Context, gated_weights
from llmopt.runtime.program import only_ops
from llmopt.runtime.weights import norm_of


class MoeBlock:
    """Mixture of experts, packed or plain."""

    def __init__(self, layer: ResolvedLayer, family: ModelFamily, config: Any) -> None:
        spec = family.moe
        assert spec is not None
        assert layer.experts is not None
        self.norm, self.eps = norm_of(layer.post_norm)
        self.module: nn.Module = layer.mlp
        self.routing = routing_of(spec, config)
        router: Any = getattr(layer.mlp, spec.router)
        self.router = router.weight.detach().contiguous()
        self.bias = _correction_bias(layer.mlp, spec)
        experts: Any = getattr(layer.experts.parent, layer.experts.attr)
        self.packed = isinstance(experts, QuantExperts)
        self._options: dict[str, Any]
        if isinstance(experts, QuantExperts):
            self.gate_up, self.down = experts.gate_up, experts.down
            self._options = {
                "intermediate": experts.intermediate_dim, "group_size": experts.gate_up_group,
                "down_group_size": experts.down_group, "asymmetric": experts.asymmetric,
            }  # fmt: skip
        else:
            self.gate_up = getattr(experts, spec.gate_up).detach()
            self.down = getattr(experts, spec.down).detach()
            self._options = {"intermediate": self.down.shape[-1]}
        self.shared = _shared_experts(layer, family, spec)
        norm: Any = layer.post_norm
        self.dtype: torch.dtype = norm.weight.dtype

    def run(self, h: torch.Tensor, ctx: Context) -> None:
        """``h += moe(norm(h))``."""
        own = not self.packed and not only_ops() and not by_triton(h)
        if own and h.shape[0] > MOST_DENSE_TOKENS:
            x = functional.rms_norm(h, (h.shape[1],), self.norm, self.eps).to(self.dtype)
            out = self.module(x[None])
            h += (out[0] if isinstance(out, tuple) else out)[0]
            return
        moe(
            h, self.norm, self.router, self.gate_up, self.down, eps=self.eps, routing=self.routing,
            correction_bias=self.bias, shared=self.shared, **self._options,
        )  # fmt: skip


def routing_of(spec: MoeSpec, config: Any) -> Routing:
    """How a model of this family and config chooses its experts."""
    grouped = spec.group_limited and getattr(config, "topk_method", "group_limited_greedy") != "greedy"
    renormalize = spec.renormalize and getattr(config, "norm_topk_prob", True)
    return Routing(
        top_k=config.num_experts_per_tok,
        scoring=spec.scoring,
        n_group=config.n_group if grouped else 1,
        topk_group=config.topk_group if grouped else 1,
        group_best=spec.group_best,
        renormalize=renormalize,
        sum_eps=spec.sum_eps,
        sum_min=0.0 if spec.sum_min_key is None else getattr(config, spec.sum_min_key),
        scale=float(getattr(config, "routed_scaling_factor", 1.0)),
    )


def _correction_bias(mlp: nn.Module, spec: MoeSpec) -> torch.Tensor | None:
    if spec.correction_bias is None:
        return None
    found: Any = mlp
    for part in spec.correction_bias.split("."):
        found = getattr(found, part)
    bias: torch.Tensor = found.detach().float().reshape(-1).contiguous()
    return bias


def _shared_experts(layer: ResolvedLayer, family: ModelFamily, spec: MoeSpec) -> SharedExperts | None:
    module = None if spec.shared is None else getattr(layer.mlp, spec.shared, None)
    if module is None:
        return None
    (gate, up), down = gated_weights(module, family, f"{layer.name}.{spec.shared}")
    if down.bias is not None or len({gate.bits, up.bits, down.bits}) > 1:
        raise UnsupportedModelError(f"{layer.name}: shared experts with biases or of several kinds")
    parts = (gate.data, up.data, down.data)
    if not gate.packed:
        return SharedExperts(*parts, gate.rows)
    return SharedExperts(*parts, gate.rows, gate.group_size, down.group_size, gate.bits, gate.asymmetric)
