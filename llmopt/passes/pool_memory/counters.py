"""What the memory of a request costs, with the pass and without it: what the kernel, or CUDA's allocator, counts."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import torch

from llmopt.measure import timing
from llmopt.measure.timing import Clock
from llmopt.passes.base import PassContext, Patch


class _Counts(Clock):
    """When each token came, and what had been counted by then."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self.counts.append(count(self._device))


def count(device: torch.device) -> int:
    """Page faults of this process that were served without a disk; on a GPU, blocks that the allocator has handed out."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])


def counted_request(ctx: PassContext, tokens: int) -> dict[str, float]:
    """One request of the measured prompt and ``tokens`` more, after one that warms up.

    Returns:
        first_token and steady_per_1000_tokens, of what :func:`count` counts; the seconds of the first token, of a steady one,
        and of the slowest one beyond it; on a GPU also reserved and active bytes.
    """
    prompt = torch.randint(
        0, ctx.resolved.vocab_size, (1, ctx.prompt_tokens), generator=torch.Generator().manual_seed(ctx.seed)
    ).to(ctx.device)
    timing.request(ctx.model, prompt, tokens + 1, Clock())
    clock = _Counts(ctx.device)
    began, counted = time.perf_counter(), count(ctx.device)
    timing.request(ctx.model, prompt, tokens + 1, clock)
    # what is put first is the prompt
    waits = sorted(b - a for a, b in zip(clock.stamps[1:], clock.stamps[2:], strict=False))
    steady = statistics.median(waits)
    found = {
        "first_token": clock.counts[1] - counted,
        "steady_per_1000_tokens": 1000 * (clock.counts[-1] - clock.counts[1]) / len(waits),
        "first_token_s": clock.stamps[1] - began,
        "steady_s": steady,
        "worst_stall_s": waits[-1] - steady,
    }
    if ctx.device.type == "cuda":
        stats = torch.cuda.memory_stats(ctx.device)
        found |= {"reserved": stats["reserved_bytes.all.current"], "active": stats["active_bytes.all.current"]}
    return found


def before_and_after(ctx: PassContext, patch: Patch, tokens: int) -> dict[str, Any]:
    """:func:`counted_request` without the patch and with it; it is off again afterwards."""
    before = counted_request(ctx, tokens)
    patch.enable()
    try:
        after = counted_request(ctx, tokens)
    finally:
        patch.disable()
    return {"counted": "allocations" if ctx.device.type == "cuda" else "page faults", "before": before, "after": after}


def said(details: dict[str, Any]) -> list[str]:
    """Lines for the receipt."""
    before, after, what = details["before"], details["after"], details["counted"]
    lines = [
        f"{what}: first token {before['first_token']:.0f} -> {after['first_token']:.0f}, per 1,000 steady tokens "
        f"{before['steady_per_1000_tokens']:.0f} -> {after['steady_per_1000_tokens']:.0f}",
        f"slowest token: {1e3 * before['worst_stall_s']:.2f} -> {1e3 * after['worst_stall_s']:.2f} ms beyond a "
        "steady one",
    ]
    if details["weights_moved"]:
        lines.insert(0, f"weights in one block: {details['weights_moved'] / 1e6:.0f} MB")
    if "allocator" in details:
        lines.append(details["allocator"])
    if "reserved" in after:
        unused = [1 - x["active"] / max(x["reserved"], 1) for x in (before, after)]
        sizes = " -> ".join(f"{x['reserved'] / 1e9:.2f} GB" for x in (before, after))
        lines.append(f"reserved {sizes}, of it unused {unused[0]:.0%} -> {unused[1]:.0%}")
    return lines
