"""quantize_gptq: 4-bit weights by GPTQ, 8-bit head and embedding, fused experts included.

The linears and experts of every decoder layer are replaced by packed modules (:mod:`llmopt.packed`) in the order in which a
forward pass meets them. Router, norms, MLA's kv_a projection and float32 islands stay as they are.
"""

from __future__ import annotations

import difflib
import fnmatch
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from llmopt import native
from llmopt.arena import arena_for
from llmopt.errors import InputError
from llmopt.models.base import LinearSite, ResolvedLayer, ResolvedModel
from llmopt.packed import QuantEmbedding, QuantLinear, kernel_group_size, uses_kernels
from llmopt.passes.base import Applied, Coverage, Event, Pass, PassContext, Patch, Phase, Swap, Verdict
from llmopt.passes.quantize_gptq import sequential
from llmopt.passes.quantize_gptq.experts import ExpertsResult, solve_experts
from llmopt.passes.quantize_gptq.rounding import Grid, check_weight, round_to_nearest
from llmopt.passes.quantize_gptq.solver import Solution, solve

GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class QuantizeGptq(Pass):
    """GPTQ at 4 bits.

    Args:
        bits: of a weight; only 4 is there.
        group_size: 32, 64, 128, or -1 for one scale a row. A last group may be short.
        sym: symmetric codes; False stores zero points.
        damp: share of the Hessian's mean diagonal added to it.
        head_bits: 8, 4, or None to leave output head and embedding as they are.
        min_expert_tokens: an expert that calibration reached with fewer tokens is starved (see :mod:`.experts`).
        skip: name patterns (``fnmatch``) of linears and experts to leave alone.
    """

    name: ClassVar[str] = "quantize_gptq"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    needs_calibration: ClassVar[bool] = True

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    damp: float = 0.01
    head_bits: int | None = 8
    min_expert_tokens: int = 64
    skip: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        def require(field_name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise InputError.argument(field_name, expected=expected, got=getattr(self, field_name))

        def whole(value: object) -> bool:
            return type(value) is int

        require("bits", whole(self.bits) and self.bits == 4, "4")
        known = whole(self.group_size) and self.group_size in GROUP_SIZES
        require("group_size", known, "32, 64, 128 or -1 (per channel)")
        require("sym", isinstance(self.sym, bool), "True or False")
        require("damp", isinstance(self.damp, int | float) and 0 < self.damp <= 1, "a share in (0, 1]")
        head_known = self.head_bits is None or (whole(self.head_bits) and self.head_bits in (4, 8))
        require("head_bits", head_known, "4, 8 or None")
        require("min_expert_tokens", whole(self.min_expert_tokens) and self.min_expert_tokens > 0, "at least 1")
        patterns = isinstance(self.skip, tuple) and all(isinstance(p, str) for p in self.skip)
        require("skip", patterns, "a tuple of name patterns")

    def check(self, ctx: PassContext) -> Verdict:
        if not ctx.resolved.layers:
            return Verdict(False, "the model has no decoder layers")
        names = [site.name for layer in ctx.resolved.layers for site in layer.linears()]
        names += [layer.experts.name for layer in ctx.resolved.layers if layer.experts is not None]
        for pattern in self.skip:
            if not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, n=2)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise InputError(f"skip: expected patterns of linears or experts of the model, got {pattern!r}{hint}")
        return Verdict(True)

    def apply(self, ctx: PassContext) -> Applied:
        return _Quantizer(self, ctx).run()


class _Quantizer:
    """One application of the pass."""

    def __init__(self, options: QuantizeGptq, ctx: PassContext) -> None:
        self.options, self.ctx = options, ctx
        self.resolved: ResolvedModel = ctx.resolved
        self.grid = Grid(options.bits, options.sym)
        self.arena = arena_for(self.resolved)
        self.swaps: list[Swap] = []
        self.coverage = Coverage()
        self.losses: dict[str, float] = {}
        self.damps: dict[str, float] = {}
        self.experts: dict[str, dict[str, Any]] = {}
        self.quantized_bytes = [0, 0]  # of linears and experts only: before, after

    @torch.no_grad()
    def run(self) -> Applied:
        started = time.perf_counter()
        inputs = sequential.capture_inputs(self.resolved, self.ctx.calibration)
        exact = inputs.twin()
        for layer in self.resolved.layers:
            self.ctx.emit(Event("progress", QuantizeGptq.name, layer.name, layer.index, len(self.resolved.layers)))
            with sequential.StandIns() as stand_ins:
                paths = sequential.Paths(layer.module, inputs, exact, stand_ins)
                self._layer(layer, paths)
                paths.advance(layer.name)
        self._head(inputs)
        self._finish_coverage()
        tokens = sum(len(r) for r in self.ctx.calibration)
        details = {
            "calibration_tokens": tokens,
            "computed_in": str(inputs.hidden[0].dtype).removeprefix("torch."),
            "loss": self.losses,
            "damp_raised": {n: d for n, d in self.damps.items() if d > self.options.damp},
            "experts": self.experts,
            "quantized_bytes_ratio": self.quantized_bytes[1] / max(self.quantized_bytes[0], 1),
            "solve_s": round(time.perf_counter() - started, 3),
        }
        return Applied(Patch(self.swaps), self.coverage, details, changes_numerics=True)

    def _skipped(self, name: str) -> bool:
        for pattern in self.options.skip:
            if fnmatch.fnmatch(name, pattern):
                self.coverage.skipped[name] = f"option skip={pattern!r}"
                return True
        return False

    def _layer(self, layer: ResolvedLayer, paths: sequential.Paths) -> None:
        given_alike = [[site.module for site in stage] for stage in layer.stages]
        paths.advance_exact(given_alike + ([[layer.experts.module]] if layer.experts else []))
        attention = self.resolved.family.attention.module
        in_attention = [s for s in layer.stages if s[0].name.startswith(f"{layer.name}.{attention}.")]
        for stage in in_attention:
            self._stage(stage, paths)
        paths.remember(layer.module, attention, layer.attention)
        if layer.experts is not None and not self._skipped(layer.experts.name):
            self._experts(layer, paths)
        for stage in layer.stages[len(in_attention) :]:
            self._stage(stage, paths)
        for site in layer.kept:
            self.coverage.skipped[site.name] = "stays in the model's dtype: small, and the whole cache hangs on it"
        if layer.router is not None:
            self.coverage.skipped[f"{layer.name}.{self.resolved.family.mlp_module} router"] = "routing stays exact"

    def _stage(self, stage: tuple[LinearSite, ...], paths: sequential.Paths) -> None:
        sites = [s for s in stage if not self._skipped(s.name)]
        if not sites:
            return
        moments = sequential.stage_moments(paths, sites[0])
        name = " + ".join(s.name for s in sites)
        solution = self._solve(torch.cat([s.module.weight for s in sites]), moments, name)
        row = 0
        for site in sites:
            rows = slice(row, row + site.module.out_features)
            row = rows.stop
            self._replace(site, _rows(solution, rows), self.options.group_size, self.options.bits)
            dequantized = _rows(solution, rows).dequantized(self.options.group_size)[0]
            paths.stand_ins.swap(site.parent, site.attr, _float_stand_in(site.module, dequantized))

    def _solve(self, weight: torch.Tensor, moments: sequential.Moments, name: str) -> Solution:
        solution = solve(
            weight[None], moments.hessian()[None], moments.drift()[None], grid=self.grid,
            group_size=self.options.group_size, damp=self.options.damp, name=name,
        )  # fmt: skip
        self.losses[name] = float(solution.loss.sum())
        self.damps[name] = solution.damp
        return solution

    def _replace(self, site: LinearSite, solution: Solution, group_size: int, bits: int) -> None:
        module = QuantLinear.from_codes(
            solution.q[0], solution.scales[0], None if solution.zeros is None else solution.zeros[0],
            None if site.module.bias is None else site.module.bias.detach(), bits=bits, group_size=group_size,
        )  # fmt: skip
        self._swap(site.parent, site.attr, module, site.module.weight, "int4 linear")

    def _swap(
        self, parent: nn.Module, attr: str, module: nn.Module, weights: torch.Tensor, kind: str, extra: int = 0
    ) -> None:
        module.eval()
        self.arena.adopt(module)
        self.swaps.append(Swap(parent, attr, module))
        before = weights.numel() * weights.element_size() + extra
        after = sum(b.numel() for b in module.buffers() if b.dtype == torch.uint8)
        self.coverage.weight_bytes_before += before
        self.coverage.weight_bytes_after += after
        self.coverage.touched += 1
        self.coverage.implementations[kind] = _implementation(weights)
        if kind.startswith("int4"):
            self.quantized_bytes[0] += before
            self.quantized_bytes[1] += after

    def _experts(self, layer: ResolvedLayer, paths: sequential.Paths) -> None:
        site = layer.experts
        assert site is not None
        seen = sequential.routed_tokens(paths, site.parent, site.attr, site.name)
        result = solve_experts(
            site, seen, grid=self.grid, group_size=self.options.group_size, damp=self.options.damp,
            min_tokens=self.options.min_expert_tokens, seed=self.ctx.seed + layer.index,
        )  # fmt: skip
        down_bytes = site.down.numel() * site.down.element_size()
        self._swap(site.parent, site.attr, result.module, site.gate_up, "int4 experts", extra=down_bytes)
        self._record_experts(site.name, result)
        paths.remember(site.parent, site.attr, _FloatExperts(result))

    def _record_experts(self, name: str, result: ExpertsResult) -> None:
        self.losses[name] = result.loss
        self.damps[name] = result.damp
        self.experts[name] = {
            "tokens_min": min(result.tokens),
            "tokens_max": max(result.tokens),
            "starved": result.starved,
            "fallback": f"filled up to {self.options.min_expert_tokens} tokens of the same layer"
            if result.starved
            else "none needed",
        }

    def _head(self, inputs: sequential.BlockInputs) -> None:
        bits, head, embedding = self.options.head_bits, self.resolved.head, self.resolved.embedding
        if bits is None:
            self.coverage.skipped["head and embedding"] = "option head_bits=None"
            return
        weight = head.module.weight
        group = kernel_group_size(weight.shape[1], 128)
        check_weight(weight, Grid(bits, True), head.name)
        check_weight(embedding.weight, Grid(8, True), self.resolved.family.embedding)
        if bits == 8:
            q, scales, _ = round_to_nearest(weight, Grid(8, True), group)
            solution = Solution(q[None], scales[None], None, weight.new_zeros(1), 0.0)
        else:
            moments = sequential.Moments(weight.shape[1], weight.device)
            for hidden in inputs.hidden:
                moments.add(self.resolved.final_norm(hidden))
            solution = solve(
                weight[None], moments.hessian()[None], grid=Grid(4, True), group_size=group, damp=self.options.damp,
                name=head.name,
            )  # fmt: skip
        module = QuantLinear.from_codes(
            solution.q[0], solution.scales[0], None,
            None if head.module.bias is None else head.module.bias.detach(), bits=bits, group_size=group,
        )  # fmt: skip
        self._swap(head.parent, head.attr, module, weight, f"{bits}-bit head")
        if self.resolved.tied:
            packed, table_bits = module.packed, bits
        else:
            q, scales, _ = round_to_nearest(embedding.weight, Grid(8, True), group)
            from llmopt.ops.int4_linear import layout

            packed, table_bits = layout.pack(q, scales, None, group_size=group, bits=8), 8
        table = QuantEmbedding(
            packed, num_embeddings=embedding.num_embeddings, embedding_dim=embedding.embedding_dim, bits=table_bits,
            group_size=group, dtype=embedding.weight.dtype, padding_idx=embedding.padding_idx,
        ).eval()  # fmt: skip
        parent, attr = self.resolved.parent_of_embedding()
        if self.resolved.tied:
            self.swaps.append(Swap(parent, attr, table))
            self.coverage.touched += 1
        else:
            self._swap(parent, attr, table, embedding.weight, f"{table_bits}-bit embedding")

    def _finish_coverage(self) -> None:
        seen: dict[int, int] = {}
        for p in self.resolved.model.parameters():
            seen[p.data_ptr()] = p.numel() * p.element_size()
        self.coverage.share_of_weight_bytes = self.coverage.weight_bytes_before / max(sum(seen.values()), 1)


def _rows(solution: Solution, rows: slice) -> Solution:
    zeros = None if solution.zeros is None else solution.zeros[:, rows]
    return Solution(solution.q[:, rows], solution.scales[:, rows], zeros, solution.loss, solution.damp)


def _float_stand_in(module: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    stand_in = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    stand_in.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    stand_in.bias = module.bias
    return stand_in


class _FloatExperts(nn.Module):
    """Dequantized experts, for calibrating what follows them."""

    gate_up: torch.Tensor
    down: torch.Tensor

    def __init__(self, result: ExpertsResult) -> None:
        super().__init__()
        self.register_buffer("gate_up", result.gate_up)
        self.register_buffer("down", result.down)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            token, choice = torch.where(index == expert)
            gate, up = nn.functional.linear(hidden[token], self.gate_up[expert]).chunk(2, dim=-1)
            y = nn.functional.linear(nn.functional.silu(gate) * up, self.down[expert])
            out.index_add_(0, token, (y * weights[token, choice, None]).to(out.dtype))
        return out


def _implementation(weights: torch.Tensor) -> str:
    if not uses_kernels(weights):
        return "torch, dequantized for every call"
    return f"cpu kernels ({native.active_isa()})" if weights.device.type == "cpu" else "Triton kernels"
