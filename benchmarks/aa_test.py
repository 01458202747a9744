"""Does the receipt tell noise from a difference? 100 verdicts on a pass that does nothing, 100 on one that adds 5%.

    python benchmarks/aa_test.py [--runs 100] [--model assets/tiny-qwen3] [--json FILE]

Runs what `optimize` runs for its verdicts (interleaved rounds of the stage before and the stage after, then
`judge_speed`), without the parts that do not decide (quality, ladder). The pass that adds 5% waits, busily, after each
forward pass for a twentieth of the time the forward pass took. Bars: "no difference" in 95 of 100, "slower" in 90 of 100.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmopt.loop import judge_speed
from llmopt.measure import environment, timing
from llmopt.models import resolve_model
from llmopt.passes.base import Patch, Swap
from llmopt.receipt import Receipt
from llmopt.stages import Stages

DELAY = 0.05


def delayed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, and then a busy wait of 5% of the time it took."""

    def slower(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        out = forward(*args, **kwargs)
        until = time.perf_counter() + DELAY * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return out

    return slower


def verdict(receipt: Receipt, prompt: torch.Tensor, patch: Patch) -> tuple[str, float]:
    """One verdict as ``optimize`` reaches it: "slower", "faster" or "no difference", and the ratio."""
    before, after = receipt.time_pair(lambda tokens: prompt[:, :tokens], "aa", (), (patch,))
    whole = timing.request_ratio(before, after, receipt.request_tokens)
    _, reason = judge_speed(whole, receipt.plan.prompt_tokens, receipt.request_tokens)
    return next(w for w in ("slower", "faster", "no difference") if reason.startswith(w)), whole.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--model", default="assets/tiny-qwen3")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", local_files_only=True).eval()
    receipt = Receipt(resolve_model(model), Stages(model), lambda event: None, False)
    prompt = torch.arange(3, 3 + receipt.plan.prompt_tokens)[None]
    patches = {"does nothing": Patch(), "adds 5%": Patch([Swap(model, "forward", delayed(model.forward))])}
    counts: dict[str, Counter[str]] = {name: Counter() for name in patches}
    ratios: dict[str, list[float]] = {name: [] for name in patches}
    for run in range(args.runs):
        for name, patch in patches.items():
            word, value = verdict(receipt, prompt, patch)
            counts[name][word] += 1
            ratios[name].append(value)
        print(f"\r{run + 1}/{args.runs} " + "; ".join(f"{n}: {dict(c)}" for n, c in counts.items()), end="", flush=True)
    print()
    right = {"does nothing": counts["does nothing"]["no difference"], "adds 5%": counts["adds 5%"]["slower"]}
    for name, bar in (("does nothing", 0.95), ("adds 5%", 0.90)):
        share = right[name] / args.runs
        print(f"{name}: {right[name]} of {args.runs} right ({'meets' if share >= bar else 'MISSES'} {bar:.0%})")
    if args.json:
        record = {"environment": environment.capture(), "runs": args.runs, "model": args.model,
                  "counts": {n: dict(c) for n, c in counts.items()}, "ratios": ratios}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
