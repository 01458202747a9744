"""pool_memory: memory planned once, a block for each lifetime, so that a request allocates little and a token nothing.

Weights that still lie apart move into one block in the order of execution; the KV cache is allocated whole before the first
token, also where the model's own layers decode; behind fuse_kernels, prefill's buffers and the caches of some batch sizes are
kept from call to call. On the CPU blocks are in huge pages. On a GPU weights have a pool of their own, and decode steps run
as CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llmopt.errors import UnsupportedModelError
from llmopt.passes.base import Applied, Coverage, Event, Pass, PassContext, Patch, Phase, Swap, Verdict

__all__ = ["PoolMemory"]

# as many tokens after the prompt as are decoded to see what a steady token costs
_STEADY_TOKENS = 32


@dataclass(frozen=True)
class PoolMemory(Pass):
    """Pooled memory for weights, KV cache and workspace.

    Args:
        weights: move weights that are not packed into one block. It takes the place of the separate ones, which wait on disk
            for ``restore`` as replaced weights do.
    """

    name: ClassVar[str] = "pool_memory"
    phase: ClassVar[Phase] = Phase.RUNTIME

    weights: bool = True

    def check(self, ctx: PassContext) -> Verdict:
        if ctx.device.type not in ("cpu", "cuda"):
            return Verdict(False, f"no pools for {ctx.device.type}")
        return Verdict(True)

    def apply(self, ctx: PassContext) -> Applied:
        from llmopt.passes.pool_memory import cache, counters, weights
        from llmopt.runtime.generate import generation_behind

        ctx.emit(Event("progress", self.name, "planning memory"))
        model: Any = ctx.resolved.model
        details: dict[str, Any] = {}
        if ctx.device.type == "cuda":
            from llmopt.passes.pool_memory.cuda import set_options

            details["allocator"] = set_options(ctx.device)  # before anything is allocated here
        planned = weights.planned(model) if self.weights else []
        coverage = Coverage(touched=len(ctx.resolved.layers), implementations={})
        swaps = weights.moved(planned, ctx.device, model)
        try:
            prepare = cache.Prepared(ctx.resolved)
            swaps.append(Swap(model, "_prepare_cache_for_generation", prepare))
            coverage.implementations["kv cache"] = "allocated before the first token"
        except UnsupportedModelError as error:
            coverage.skipped["kv cache"] = str(error)
        if generation_behind(vars(model).get("generate")) is not None:
            coverage.implementations["workspace"] = "kept from call to call"
        if planned:
            coverage.implementations["weights"] = "one block, in huge pages" if ctx.device.type == "cpu" else "one pool"

        def switched(pooled: bool) -> None:
            generation = generation_behind(vars(model).get("generate"))
            if generation is not None:
                generation.changed(pooled=pooled)

        patch = Patch(swaps, on_enable=lambda: switched(True), on_disable=lambda: switched(False))
        details["weights_moved"] = sum(p.nbytes for p in planned)
        if ctx.timed:
            details |= counters.before_and_after(ctx, patch, _STEADY_TOKENS)
            details["said"] = counters.said(details)
        return Applied(patch, coverage, details)
