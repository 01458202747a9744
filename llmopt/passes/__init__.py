"""The passes, in the order of their phases. A new pass is one file (or folder) and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from llmopt.errors import InputError
from llmopt.passes.base import Pass
from llmopt.passes.compile_tvm import CompileTvm
from llmopt.passes.fuse_kernels import FuseKernels
from llmopt.passes.pool_memory import PoolMemory
from llmopt.passes.quantize_gptq import QuantizeGptq
from llmopt.passes.swap_flash_attention import SwapFlashAttention

PASSES: dict[str, type[Pass]] = {
    p.name: p for p in (QuantizeGptq, SwapFlashAttention, FuseKernels, CompileTvm, PoolMemory)
}

__all__ = ["PASSES", "CompileTvm", "FuseKernels", "PoolMemory", "QuantizeGptq", "SwapFlashAttention", "choose"]


def choose(passes: Sequence[str | Pass] | None) -> list[Pass]:
    """Turn names and pass objects into passes in running order; None means all.

    Raises:
        InputError: an unknown name (with the nearest), something that is not a pass, or one pass twice.
    """
    if isinstance(passes, str | Pass):
        passes = [passes]
    if passes is not None and not isinstance(passes, Iterable):
        raise InputError.argument("passes", expected="None, or a sequence of names and Pass objects", got=passes)
    chosen: list[Pass] = []
    for item in list(PASSES) if passes is None else passes:
        if isinstance(item, Pass):
            chosen.append(item)
        elif isinstance(item, str) and item in PASSES:
            chosen.append(PASSES[item]())
        else:
            near = difflib.get_close_matches(str(item), PASSES, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise InputError(f"passes: expected names among {', '.join(PASSES)} or Pass objects, got {item!r}{hint}")
    names = [p.name for p in chosen]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"passes: expected each pass once, got {name!r} {names.count(name)} times")
    return sorted(chosen, key=lambda p: p.phase)
