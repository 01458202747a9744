"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over the latent cache.

A few tokens a sequence run absorbed, on the latents as they are; more run expanded, which costs fewer multiplications from
some dozens of queries on.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from llmopt.errors import UnsupportedModelError
from llmopt.models.base import ModelFamily, ResolvedLayer
from llmopt.ops.fused_linear import Weight
from llmopt.ops.int4_linear import int4_linear
from llmopt.ops.int8_linear import int8_linear
from llmopt.ops.latent_attention import latent_attention
from llmopt.ops.latent_cache import absorbed_weights, expanded_attention, latent_cache
from llmopt.ops.latent_output import latent_output
from llmopt.packed import QuantLinear
from llmopt.runtime.blocks import Context
from llmopt.runtime.linear import linears
from llmopt.runtime.weights import norm_of, weight_of

# tokens of one sequence up to which the absorbed form is used
_MOST_ABSORBED = 32
# expanded keys and values at a time: on the CPU a few heads', which stay in its caches; a GPU wants many programs a launch
_HEADS_AT_ONCE, _MOST_EXPANDED = 4, 1 << 29


_Halves = tuple[torch.Tensor, torch.Tensor]
# Kept with the module they were made from: an engine is made anew whenever patches change, and making these takes a tenth of a
# second for a model of 27 layers.
_MADE: WeakKeyDictionary[nn.Module, tuple[tuple[float, ...], _Halves]] = WeakKeyDictionary()


def _halves_of(kv_b: Any, heads: int, nope: int) -> _Halves:
    quantized = isinstance(kv_b, QuantLinear)
    weight = kv_b.packed if quantized else kv_b.weight.detach()
    # a sample of the values too: whoever writes through `.data` leaves the version as it is
    sample = weight.reshape(-1)[:: max(1, weight.numel() // 1000)].double().sum().item()
    made_from = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, sample, heads, nope)
    kept = _MADE.get(kv_b)
    if kept is None or kept[0] != made_from:
        dense = kv_b.dequantize() if quantized else weight
        dtype = torch.uint8 if quantized else dense.dtype
        # packing is the CPU's
        uk, uv = absorbed_weights(dense.cpu(), heads=heads, nope=nope, dtype=dtype)
        kept = made_from, (uk.to(weight.device), uv.to(weight.device))
        _MADE[kv_b] = kept
    return kept[1]


class LatentBlock:
    """MLA: norm with the products for query and latents, cache write, attention, output with residual."""

    def __init__(self, layer: ResolvedLayer, family: ModelFamily, config: Any) -> None:
        module: Any = layer.attention
        self.index, self.scale = layer.index, float(module.scaling)
        self.norm, self.eps = norm_of(layer.input_norm)
        self.heads, self.rank = int(module.num_heads), int(module.kv_lora_rank)
        self.nope, self.rope_dim = int(module.qk_nope_head_dim), int(module.qk_rope_head_dim)
        self.v_dim = int(module.v_head_dim)
        self.kv_a = weight_of(module.kv_a_proj_with_mqa, f"{layer.name}.kv_a_proj_with_mqa")
        self.kv_norm, self.kv_eps = norm_of(module.kv_a_layernorm)
        self.q_b: Weight | None = None
        if getattr(module, "q_lora_rank", None) is None:
            self.q = weight_of(module.q_proj, f"{layer.name}.q_proj")
        else:
            self.q = weight_of(module.q_a_proj, f"{layer.name}.q_a_proj")
            self.q_b = weight_of(module.q_b_proj, f"{layer.name}.q_b_proj")
            self.q_norm, self.q_eps = norm_of(module.q_a_layernorm)
        self.output = weight_of(module.o_proj, f"{layer.name}.o_proj")
        self.kv_b = weight_of(module.kv_b_proj, f"{layer.name}.kv_b_proj")
        if self.kv_b.bias is not None:
            raise UnsupportedModelError(f"{layer.name}: kv_b_proj has a bias")
        self._module = module
        self._halves: dict[str, _Halves] = {}

    @property
    def row_size(self) -> int:
        """Values of one cached token."""
        return self.rank + self.rope_dim

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK and W_UV, made when first needed: at 8 bits of a quantized kv_b_proj, else in its own dtype."""
        if "both" not in self._halves:
            # programs hold addresses: of threads that make them at once, all go on with those of the first
            self._halves.setdefault("both", _halves_of(self._module.kv_b_proj, self.heads, self.nope))
        return self._halves["both"]

    def stand_in(self) -> tuple[nn.Module, int]:
        """kv_b_proj, which a decode step does not read, and the bytes it reads in its place."""
        return self._module.kv_b_proj, sum(half.nbytes for half in self.halves())

    def run(self, h: torch.Tensor, ctx: Context) -> None:
        """``h += attention(norm(h))``, latents written to the cache."""
        q, kv_a = self._project(h, ctx)
        rows, (cache, scales) = ctx.rows, ctx.cache.latents(self.index)
        absorbed = ctx.work.recorded or rows.longest_run() <= _MOST_ABSORBED
        w_uk, w_uv = self.halves() if absorbed else (None, None)
        query = latent_cache(
            q, kv_a, self.kv_norm, eps=self.kv_eps, cos=ctx.rope.cos, sin=ctx.rope.sin, position=rows.position,
            seq=rows.seq, slot=rows.slot, interleaved=ctx.rope.interleaved, heads=self.heads, w_uk=w_uk, cache=cache,
            latent_scale=scales,
        )  # fmt: skip
        if w_uv is None:
            out = self._expanded(query, cache, scales, ctx)
        else:
            latent = latent_attention(
                ctx.work.keep(query), cache, seq=rows.seq, slot=rows.slot, scale=self.scale, rank=self.rank,
                start=ctx.cache.start, latent_scale=scales,
            )  # fmt: skip
            out = latent_output(ctx.work.keep(latent), w_uv, v_dim=self.v_dim)
        linears(ctx.work.keep(out), (self.output,), h, mode="add")

    def _project(self, h: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``[T, H * (n + P)]`` and latents with rope keys ``[T, R + P]``."""
        both = ctx.work.get("latent", h.shape[0], self.q.rows + self.kv_a.rows)
        linears(h, (self.q, self.kv_a), both, norm=self.norm, eps=self.eps)
        q, kv_a = both[:, : self.q.rows], both[:, self.q.rows :]
        if self.q_b is not None:
            full = ctx.work.get("latent_q", h.shape[0], self.q_b.rows)
            linears(q, (self.q_b,), full, norm=self.q_norm, eps=self.q_eps)
            q = full
        return ctx.work.keep(q), ctx.work.keep(kv_a)

    def _expanded(
        self, query: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None, ctx: Context
    ) -> torch.Tensor:
        parts = []
        for part, seq, last in ctx.rows.runs():
            start = int(ctx.cache.start[seq])
            parts.append(
                expanded_attention(
                    query[part], cache[:, start:], self._expand, seq=seq, keys=last + 1 - start, nope=self.nope,
                    rope=self.rope_dim, scale=self.scale, heads_at_once=self._heads_at_once(last + 1 - start, cache.device),
                    latent_scale=None if scales is None else scales[:, start:],
                )
            )  # fmt: skip
        return torch.cat(parts)

    def _heads_at_once(self, keys: int, device: torch.device) -> int:
        if device.type == "cpu":
            return _HEADS_AT_ONCE
        return max(_HEADS_AT_ONCE, min(self.heads, _MOST_EXPANDED // (keys * (self.nope + self.v_dim))))

    def _expand(self, latents: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """kv_b_proj of heads [first, last): ``[keys, (last - first) * (n + V)]``."""
        width = self.nope + self.v_dim
        begin, end, weight = first * width, last * width, self.kv_b
        if not weight.packed:
            return functional.linear(latents.to(weight.data.dtype), weight.data[begin:end]).to(latents.dtype)
        if begin % 16 or end % 16:
            begin, end = 0, weight.rows
        data = weight.data[begin // 16 : -(-end // 16)]
        if weight.bits == 4:
            out = int4_linear(
                latents, data, out_features=end - begin, group_size=weight.group_size, asymmetric=weight.asymmetric
            )
        else:
            out = int8_linear(latents, data, out_features=end - begin, group_size=weight.group_size)
        return out if begin == first * width and end == last * width else out[:, first * width : last * width]
