"""swap_flash_attention: tiled attention in place of eager or stock attention, the fastest correct implementation here.

Per instance: one name in the model's own config, through transformers' ``AttentionInterface`` and
``AttentionMaskInterface``. DeepSeek's latent attention runs absorbed over the compressed cache (:mod:`.mla`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmopt.errors import InputError
from llmopt.passes.base import Applied, Coverage, Event, Pass, PassContext, Patch, Phase, Swap, Verdict
from llmopt.passes.swap_flash_attention import candidates
from llmopt.passes.swap_flash_attention.candidates import Choice
from llmopt.passes.swap_flash_attention.forward import CANDIDATES, register
from llmopt.passes.swap_flash_attention.mla import LatentAttention


@dataclass(frozen=True)
class SwapFlashAttention(Pass):
    """FlashAttention-2 style attention.

    Args:
        force: run this implementation ("llmopt", "sdpa" or "flash_attn") instead of choosing by measuring.
    """

    name: ClassVar[str] = "swap_flash_attention"
    phase: ClassVar[Phase] = Phase.ATTENTION

    force: str | None = None

    def __post_init__(self) -> None:
        if self.force is not None and self.force not in CANDIDATES:
            raise InputError.argument("force", expected=" | ".join(CANDIDATES), got=self.force)

    def check(self, ctx: PassContext) -> Verdict:
        usable = candidates.available(ctx.device)
        if self.force is not None and usable[self.force]:
            return Verdict(False, f"{self.force}: {usable[self.force]}")
        latent = ctx.resolved.family.attention.kind == "mla"
        if latent and usable["llmopt"]:
            return Verdict(False, f"absorbed latent attention needs our kernel: {usable['llmopt']}")
        if self.force is None and all(usable[n] for n in usable if n != "sdpa"):
            if ctx.config._attn_implementation == "sdpa":
                reasons = "; ".join(f"{n}: {r}" for n, r in usable.items() if r)
                return Verdict(False, f"the model runs torch SDPA already, and nothing else can run here ({reasons})")
        return Verdict(True)

    @torch.no_grad()
    def apply(self, ctx: PassContext) -> Applied:
        started = time.perf_counter()
        ctx.emit(Event("progress", self.name, "timing attention implementations"))
        choice = self._choose(ctx)
        implementation = register(choice.prefill, choice.decode)
        swaps = [Swap(ctx.config, "_attn_implementation", implementation)]
        latent = ctx.resolved.family.attention.kind == "mla"
        if latent:
            for layer in ctx.resolved.layers:
                mla = LatentAttention(layer.attention)
                swaps += [Swap(layer.attention, "llmopt_mla", mla), Swap(layer.attention, "expand_kv", mla.keep_latent)]
        coverage = Coverage(
            touched=len(ctx.resolved.layers),
            implementations={
                "prefill": "absorbed or expanded latents, " + choice.prefill if latent else choice.prefill,
                "decode": "absorbed latents, llmopt" if latent else choice.decode,
            },
            skipped={n: r for n, r in candidates.available(ctx.device).items() if r} | choice.rejected,
        )
        details = {
            "registered_as": implementation,
            "times_us": choice.times_us,
            "choose_s": round(time.perf_counter() - started, 3),
        }
        return Applied(Patch(swaps), coverage, details)

    def _choose(self, ctx: PassContext) -> Choice:
        if self.force is not None:
            return Choice(self.force, self.force, {}, {})
        names = [n for n, reason in candidates.available(ctx.device).items() if not reason]
        shape = candidates.shape_of(ctx.config, ctx.resolved.family.attention.kind)
        module = ctx.resolved.layers[0].attention
        return candidates.choose(names, module, shape, ctx.resolved.dtype, ctx.device, ctx.prompt_tokens)
