"""Prompt lookup against plain decoding of the same tokens.

    python benchmarks/bench_prompt_lookup.py [--shape qwen3-0.6b] [--depth 512] [--tokens 128] [--rounds 7] [--json FILE]

A model of random weights says nothing that a prompt would help to guess, so the tokens are given: a processor that both
ways have makes each the most likely one. What is verified and what is not is then as with a model that writes this text:

  copy     the prompt over again, with one token in sixteen changed: an edit of a given text
  quote    half of it is stretches of 24 tokens from the prompt, half is new: an answer that quotes
  prose    held-out text in the tokens of a bundled checkpoint: what follows a common word follows it now and then
  mislead  the prompt's tokens in another order: each was there, and what followed it there does not follow now
  floor    no token was there before: nothing to guess

Milliseconds a token between the first token and the last, medians of interleaved calls; ratios are of pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from llmopt import native
from llmopt.measure import environment, timing
from llmopt.models import resolve_model, shapes
from llmopt.passes import FuseKernels
from llmopt.passes.base import PassContext
from llmopt.passes.quantize_gptq.direct import build_quantized

ASSETS = Path(__file__).parent.parent / "assets"
GUESSES = 15


class Given(LogitsProcessor):  # type: ignore[misc]
    """Makes the tokens of a text the most likely ones."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.text[input_ids.shape[1]]] = torch.inf
        return scores


class Clock(timing.Clock):
    def ms_per_token(self) -> float:
        """Between the first generated token and the last."""
        return (self.stamps[-1] - self.stamps[1]) / (len(self.stamps) - 2) * 1e3


def texts(depth: int, tokens: int, vocab: int, seed: int = 0) -> dict[str, list[int]]:
    """Prompt and continuation of each kind, ``depth + tokens`` ids."""
    draw = random.Random(seed)
    fresh = draw.sample(range(vocab), depth + 2 * tokens)
    prompt, new = fresh[:depth], fresh[depth:]
    copy = [new[i] if i % 16 == 15 else prompt[i % depth] for i in range(tokens)]
    quote: list[int] = []
    while len(quote) < tokens:
        at = draw.randrange(depth - 24)
        quote += prompt[at : at + 24] + [new.pop() for _ in range(24)]
    mislead = [token for _ in range(0, tokens, depth) for token in draw.sample(prompt, depth)]
    found = {"copy": copy, "quote": quote, "mislead": mislead, "floor": fresh[depth:]}
    return {name: prompt + text[:tokens] for name, text in found.items()} | {"prose": prose(depth + tokens)}


def prose(tokens: int) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-qwen3", local_files_only=True)
    ids: list[int] = tokenizer((ASSETS / "heldout.txt").read_text()[: 16 * tokens]).input_ids
    return ids[:tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default="copy,quote,prose,mislead,floor")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, _ = build_quantized(args.shape)
    applied = FuseKernels().apply(PassContext(resolve_model(model), torch.device("cpu"), emit=lambda event: None))
    applied.patch.enable()
    counts = applied.details["prompt_lookup"]

    def run(text: list[int], **options: Any) -> float:
        clock = Clock()
        prompt = torch.tensor([text[: args.depth]])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens, do_sample=False, streamer=clock,
            logits_processor=[Given(text)], eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
        assert out[0].tolist() == text
        return clock.ms_per_token()

    print(f"{args.shape}, {torch.get_num_threads()} threads, {native.active_isa()}, depth {args.depth}, "
          f"{args.tokens} tokens, {args.rounds} rounds")  # fmt: skip
    record: dict[str, Any] = {}
    found = texts(args.depth, args.tokens, model.config.vocab_size)
    for name in args.cases.split(","):
        text = found[name]
        ways: dict[str, Callable[[], float]] = {
            "plain": lambda text=text: run(text),
            "lookup": lambda text=text: run(text, prompt_lookup_num_tokens=GUESSES, max_matching_ngram_size=3),
        }
        samples: dict[str, list[float]] = {way: [] for way in ways}
        for done in range(args.rounds + 1):
            if done == 1:  # the first round warms up
                counts.update(dict.fromkeys(counts, 0))
            for way, call in ways.items():
                ms = call()
                if done:
                    samples[way].append(ms)
        ratio = statistics.median(a / b for a, b in zip(samples["plain"], samples["lookup"], strict=True))
        plain, lookup = (statistics.median(samples[way]) for way in ways)
        print(f"{name:8} plain {plain:6.2f} ms, lookup {lookup:6.2f} ms a token: {ratio:.3f}x; {counts['right']} of "
              f"{counts['guesses']} guesses right in {counts['steps']} steps")  # fmt: skip
        record[name] = {"samples": samples, "counts": dict(counts)}
    if args.json:
        args.json.write_text(json.dumps({"environment": environment.capture(), "cases": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
