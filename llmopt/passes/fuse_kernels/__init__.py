"""fuse_kernels: the decoder as a few fused ops a layer, and a recorded decode step behind ``generate``.

The engine (:mod:`llmopt.runtime`) reads the modules as they are when the pass is switched on: packed by quantize_gptq or
plain. Weights stay where they are; what is replaced is the stack's ``forward``, the head's, and generate's inner loop.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llmopt.errors import InputError, UnsupportedModelError
from llmopt.models.base import ResolvedModel
from llmopt.ops.device import kernels_for
from llmopt.passes.base import Applied, Coverage, Event, Pass, PassContext, Patch, Phase, Swap, Verdict

__all__ = ["FuseKernels"]

KV_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
# the trial of a screened head: positions, the share with the same top-1 that is asked for, and the share of rows scored with
# 8 bits from which the screen saves too little
_TRIAL_TOKENS, _LEAST_AGREEMENT, _MOST_SCORED = 128, 0.999, 0.1


@dataclass(frozen=True)
class FuseKernels(Pass):
    """Fused kernels and the decode loop.

    Args:
        kv_dtype: of the KV cache: "bf16", "fp16", "fp32" or "int8"; None: the model's dtype. "int8" takes about half the bytes
            of bf16: each head of a token has a float32 scale, as a token's latent has (DeepSeek). It changes outputs, which the
            receipt's quality figures show (of DeepSeek the cache's rounding, not that of a decoded token's products).
        screened_head: find greedy tokens by an 8-bit head's high nibbles, and score with all 8 bits only the rows that may win;
            whatever looks at logits gets all of them. None: where the head is large enough and a trial finds the same tokens.
        prompt_lookup: most tokens to guess from what followed the same words earlier in the sequence (0 to 15; 0: none).
            They are verified together in one step. On the CPU the tokens stay those of plain decoding, on a GPU near ties may
            fall otherwise; a batch decodes plainly.
    """

    name: ClassVar[str] = "fuse_kernels"
    phase: ClassVar[Phase] = Phase.FUSE

    kv_dtype: str | None = None
    screened_head: bool | None = None
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise InputError.argument("kv_dtype", expected=f"None or {' | '.join(KV_DTYPES)}", got=self.kv_dtype)
        if self.screened_head not in (None, True, False):
            raise InputError.argument("screened_head", expected="None, True or False", got=self.screened_head)
        from llmopt.runtime.lookup import MOST_GUESSES

        if type(self.prompt_lookup) is not int or not 0 <= self.prompt_lookup <= MOST_GUESSES:
            raise InputError.argument("prompt_lookup", expected=f"0 to {MOST_GUESSES}", got=self.prompt_lookup)

    def check(self, ctx: PassContext) -> Verdict:
        reason = _unserved(ctx.device)
        if reason:
            return Verdict(False, reason)
        from llmopt.runtime import screen
        from llmopt.runtime.engine import Engine

        try:
            engine = Engine(ctx.resolved, kv_dtype=self._kv_dtype())
        except UnsupportedModelError as error:
            return Verdict(False, str(error))
        reason = screen.unfit(engine.head) if self.screened_head else ""
        return Verdict(not reason, f"screened_head: {reason}" if reason else "")

    def apply(self, ctx: PassContext) -> Applied:
        from llmopt.runtime.forward import FusedForward
        from llmopt.runtime.generate import Generation
        from llmopt.runtime.lookup import Lookup

        ctx.emit(Event("progress", self.name, "fusing the decoder"))
        resolved, fallbacks = ctx.resolved, dict[str, int]()
        model: Any = resolved.model
        kv_dtype = self._kv_dtype()
        current = _Current(resolved, self.screened_head, kv_dtype)
        head, trial = self._head(ctx, current)
        stack = model.get_submodule(resolved.family.layers.rpartition(".")[0])
        lookup = Lookup(self.prompt_lookup) if self.prompt_lookup else None
        generation = Generation(model, current, lookup)
        # the head as given and the one that stands there now: other passes' patches may be off while this one is on
        heads: dict[int, nn.Module] = {
            id(head): head for head in (resolved.head.module, getattr(resolved.head.parent, resolved.head.attr))
        }
        swaps = [
            Swap(stack, "forward", FusedForward(stack, current.get, fallbacks)),
            *(Swap(head, "forward", _FusedHead(head, current.get)) for head in heads.values()),
            Swap(model, "generate", generation.generate),
            Swap(model, "_prepare_cache_for_generation", generation.prepare_cache),
        ]
        coverage = Coverage(
            touched=len(resolved.layers),
            implementations={
                "decoder layers": "fused CPU kernels" if ctx.device.type == "cpu" else "Triton kernels",
                "generate": "recorded decode step" if ctx.device.type == "cpu" else "decode step of our ops",
                "head": head,
                "kv cache": _name_of(kv_dtype or resolved.dtype),
            },
        )
        details = {
            "kv_dtype": str(kv_dtype or resolved.dtype).removeprefix("torch."),
            "fallbacks_to_own_forward": fallbacks,
            "fallbacks_to_own_loop": generation.own_loops,
            "prompt_lookup": generation.lookup_counts,
            **trial,
        }

        def modules_changed() -> None:
            current.forget()
            generation.forget()

        patch = Patch(swaps, on_enable=modules_changed)
        settled = {"screened_head": current.screened} if trial else {}
        return Applied(patch, coverage, details, changes_numerics=kv_dtype == torch.int8, settled=settled)

    def _kv_dtype(self) -> torch.dtype | None:
        return None if self.kv_dtype is None else KV_DTYPES[self.kv_dtype]

    def _head(self, ctx: PassContext, current: _Current) -> tuple[str, dict[str, Any]]:
        """How greedy tokens are found, and the trial of a screened head if there was one."""
        from llmopt.runtime import screen

        chosen = "greedy: all rows in 4 bits, those that may win in 8"
        engine = current.get()
        if not engine.screened:
            return "all rows", {}
        if self.screened_head and not ctx.trials:
            return chosen, {}
        generator = torch.Generator().manual_seed(ctx.seed)
        drawn = torch.randint(0, engine.vocab_size, (_TRIAL_TOKENS,), generator=generator)
        found = screen.agreement(engine, (ctx.calibration[0] if ctx.calibration else drawn)[:_TRIAL_TOKENS])
        trial = {"screened_head": dataclasses.asdict(found)}
        if self.screened_head is None and (found.share < _LEAST_AGREEMENT or found.rows_scored > _MOST_SCORED):
            current.screened = False
            current.forget()
            return "all rows: the screen was left out after its trial", trial
        current.screened = True
        return chosen, trial


def _unserved(device: torch.device) -> str:
    """Why the fused ops cannot run on a device, or ''."""
    if device.type not in ("cpu", "cuda"):
        return f"no fused kernels for {device.type}"
    if not kernels_for(device.type):
        gpu = "Triton (pip install llmopt[gpu]) and NVIDIA GPUs of compute capability 8.0 or later"
        return f"needs {'the compiled kernels' if device.type == 'cpu' else gpu}"
    return ""


def _name_of(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{name}, a float32 scale for each head and token" if dtype == torch.int8 else name


class _Current:
    """The engine for the modules as they are now: made when first asked for, forgotten when patches change."""

    def __init__(self, resolved: ResolvedModel, screened: bool | None, kv_dtype: torch.dtype | None) -> None:
        self._resolved, self.screened, self._kv_dtype = resolved, screened, kv_dtype
        self._engine: Any = None
        self.pooled = False

    def get(self) -> Any:
        if self._engine is None:
            from llmopt.runtime.engine import Engine

            self._engine = Engine(self._resolved, self.screened, self._kv_dtype, self.pooled)
        return self._engine

    def forget(self) -> None:
        self._engine = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model has an engine of its own, over its own modules
        return {**vars(self), "_engine": None}


class _FusedHead:
    """The head's ``forward``: float32 in, float32 logits out, whatever the weight."""

    def __init__(self, head: nn.Module, engine: Any) -> None:
        self._own, self._engine = head.forward, engine

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from llmopt.runtime.linear import linears

        engine = self._engine()
        if x.device != engine.device or (torch.is_grad_enabled() and x.requires_grad):
            own: torch.Tensor = self._own(x)
            return own
        out = torch.empty(*x.shape[:-1], engine.vocab_size, device=x.device)
        linears(x.reshape(-1, x.shape[-1]), (engine.head,), out.view(-1, engine.vocab_size))
        return out
