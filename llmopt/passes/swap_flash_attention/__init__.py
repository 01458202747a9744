"""swap_flash_attention: tiled attention in place of eager or stock attention, the fastest correct implementation here.

Per instance: one name in the model's own config, through transformers' ``AttentionInterface`` and
``AttentionMaskInterface``. DeepSeek's latent attention runs absorbed over the compressed cache (:mod:`.mla`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmopt.errors import InputError
from llmopt.passes.base import Applied, Coverage, Event, Pass, PassContext, Patch, Phase, Swap, Verdict
from llmopt.passes.swap_flash_attention.candidates import Bench, Choice, absorbed_crossing, available, choose
from llmopt.passes.swap_flash_attention.forward import CANDIDATES, Plan, register
from llmopt.passes.swap_flash_attention.mla import LatentAttention

__all__ = ["SwapFlashAttention"]


@dataclass(frozen=True)
class SwapFlashAttention(Pass):
    """FlashAttention-2 style attention.

    Args:
        candidates: implementations to choose from by measuring: "llmopt" (our kernel: C++ on the CPU, Triton on a GPU), "sdpa"
            (torch's choice), and on CUDA "cudnn" (torch SDPA by cuDNN) and "flash_attn" (the package). None: all that can run
            here.
        force: run this one without choosing.
    """

    name: ClassVar[str] = "swap_flash_attention"
    phase: ClassVar[Phase] = Phase.ATTENTION

    candidates: tuple[str, ...] | None = None
    force: str | None = None

    def __post_init__(self) -> None:
        names = " | ".join(CANDIDATES)
        if self.force is not None and self.force not in CANDIDATES:
            raise InputError.argument("force", expected=names, got=self.force)
        if self.candidates is None:
            return
        if isinstance(self.candidates, str) or not self.candidates or not set(self.candidates) <= set(CANDIDATES):
            raise InputError.argument("candidates", expected=f"None or a tuple of {names}", got=self.candidates)
        if self.force is not None:
            raise InputError.argument("force", expected="None where candidates are given", got=self.force)

    def check(self, ctx: PassContext) -> Verdict:
        if ctx.device.type not in ("cpu", "cuda"):
            return Verdict(False, f"no implementation for {ctx.device.type}")
        usable, reasons = self._usable(ctx)
        if not usable:
            return Verdict(False, _listed(reasons))
        if usable == ["sdpa"] and ctx.config._attn_implementation == "sdpa":
            return Verdict(False, f"the model runs torch SDPA already, nothing else can run here ({_listed(reasons)})")
        return Verdict(True)

    @torch.no_grad()
    def apply(self, ctx: PassContext) -> Applied:
        started = time.perf_counter()
        ctx.emit(Event("progress", self.name, "timing attention implementations"))
        usable, reasons = self._usable(ctx)
        latents = [LatentAttention(m) for m in _attentions(ctx)] if "llmopt" in usable and not _unlatent(ctx) else []
        choice, crossing = self._choose(ctx, usable, latents)
        if "llmopt" not in (choice.prefill, choice.decode):
            latents = []
        for latent in latents:
            latent.most_absorbed = crossing
        plan = Plan(choice.prefill, choice.decode)
        details: dict[str, Any] = {"times_us": choice.times_us, "fallbacks_to_eager": plan.fallbacks}
        if latents:
            details["most_absorbed_queries"] = crossing
        coverage = Coverage(
            touched=len(ctx.resolved.layers),
            implementations=_implementations(choice, bool(latents)),
            skipped=reasons | choice.rejected | _latents_skipped(ctx, latents),
        )
        details["choose_s"] = round(time.perf_counter() - started, 3)
        patch = Patch(_swaps(ctx, plan, latents), on_enable=lambda: _count_copies(coverage, latents))
        return Applied(patch, coverage, details)

    def _usable(self, ctx: PassContext) -> tuple[list[str], dict[str, str]]:
        """Candidates that were asked for and can run here, and why the others cannot."""
        found = available(ctx.device, ctx.resolved.dtype)
        asked = (self.force,) if self.force is not None else self.candidates or tuple(found)
        return [n for n in asked if not found[n]], {n: found[n] for n in asked if found[n]}

    def _choose(self, ctx: PassContext, usable: list[str], latents: list[LatentAttention]) -> tuple[Choice, int]:
        """Winners, and the number of queries up to which latent attention runs absorbed."""
        latent = latents[0] if latents else None
        bench = Bench(_attentions(ctx)[0], latent, ctx.config, ctx.resolved.dtype, ctx.device)
        crossing = 0
        if latent is not None:
            crossing = latent.most_absorbed = absorbed_crossing(bench, latent)
        if self.force is not None:
            return Choice(self.force, self.force), crossing
        return choose(bench, usable, ctx.prompt_tokens), crossing


def _swaps(ctx: PassContext, plan: Plan, latents: list[LatentAttention]) -> list[Swap]:
    modules = _attentions(ctx)
    if plan.prefill == plan.decode == "sdpa":
        # nothing of ours would run: transformers' own path serves every case it knows
        return [Swap(ctx.config, "_attn_implementation", "sdpa")]
    swaps = [Swap(ctx.config, "_attn_implementation", register())]
    swaps += [Swap(module, "llmopt_attention", plan) for module in modules]
    for module, latent in zip(modules, latents, strict=False):
        swaps += [Swap(module, "llmopt_latent", latent), Swap(module, "expand_kv", latent.keep_latent)]
    return swaps


def _implementations(choice: Choice, latent: bool) -> dict[str, str]:
    names = {"prefill": choice.prefill, "decode": choice.decode}
    if latent:
        for kind, name in names.items():
            absorbed = kind == "decode" and name == "llmopt"
            names[kind] = f"{name}, {'absorbed' if absorbed else 'expanded'} latents"
    return names


def _attentions(ctx: PassContext) -> list[Any]:
    return [layer.attention for layer in ctx.resolved.layers]


def _unlatent(ctx: PassContext) -> str:
    """Why attention cannot run on latents, or ''."""
    if ctx.resolved.family.attention.kind != "mla":
        return "keys and values are no latents"
    reasons = (LatentAttention.unsupported(module) for module in _attentions(ctx))
    return next((reason for reason in reasons if reason), "")


def _latents_skipped(ctx: PassContext, latents: list[LatentAttention]) -> dict[str, str]:
    if latents or ctx.resolved.family.attention.kind != "mla":
        return {}
    return {"absorbed latents": _unlatent(ctx) or "needs our kernel"}


def _count_copies(coverage: Coverage, latents: list[LatentAttention]) -> None:
    """Dequantize what the absorbed form needs now rather than in the first decode step, and put it on the receipt."""
    with torch.no_grad():
        coverage.weight_bytes_after = sum(latent.copied_bytes() for latent in latents)


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
