"""What sampling costs a decoded token: drawn in the step, by transformers' processors, and not at all (greedy).

    python benchmarks/sampled_decode.py [--shape qwen3-0.6b] [--batches 1,8] [--tokens 32] [--rounds 9] [--markdown FILE]

Random int4 weights of the shape, fuse_kernels' ``generate``. transformers' processors and ``torch.multinomial`` run where a
call asks for the scores they make (``return_dict_in_generate``); the tokens are the same, for the same seed. Milliseconds a
token between the first token and the last, medians of interleaved calls; ratios to the drawn step are of pairs, with a 95%
interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from llmopt import native
from llmopt.measure import environment, stats, timing
from llmopt.models import resolve_model, shapes
from llmopt.passes import FuseKernels
from llmopt.passes.base import PassContext
from llmopt.passes.quantize_gptq.direct import build_quantized

DEPTH = 128
KINDS: dict[str, dict[str, Any]] = {
    # Qwen3's generation config
    "temperature, top-k, top-p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "temperature, top-p": {"temperature": 0.6, "top_k": 0, "top_p": 0.95},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "repetition penalty, top-k": {"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
}


def ms_per_token(model: Any, prompt: torch.Tensor, tokens: int, **options: Any) -> tuple[float, torch.Tensor]:
    """Between the first generated token and the last; and the tokens."""
    clock = timing.Clock()
    torch.manual_seed(0)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, streamer=clock if len(prompt) == 1 else None,
        stopping_criteria=None if len(prompt) == 1 else [_stamp(clock)], eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    stamps = clock.stamps[len(prompt) == 1 :]
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1) * 1e3, out if isinstance(out, torch.Tensor) else out.sequences


def _stamp(clock: timing.Clock) -> Any:
    """A criterion that never ends: a streamer is for one sequence."""

    def criterion(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        clock.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return criterion


def measure(model: Any, prompt: torch.Tensor, tokens: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Samples by kind and way."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind, options in KINDS.items():
        ways = {
            "drawn": {"do_sample": True, **options},
            "transformers": {"do_sample": True, "return_dict_in_generate": True, **options},
            "greedy": {"do_sample": False},
        }
        samples: dict[str, list[float]] = {way: [] for way in ways}
        for done in range(rounds + 1):
            given = {}
            for way, asked in ways.items():
                ms, given[way] = ms_per_token(model, prompt, tokens, **asked)
                if done:  # the first round warms up
                    samples[way].append(ms)
            assert torch.equal(given["drawn"], given["transformers"])
        found[kind] = samples
    return found


def table(found: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    rows = [
        "| sequences | filters | drawn ms | transformers' ms | its time / drawn | greedy ms | its time / drawn |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, kinds in found.items():
        for kind, samples in kinds.items():
            ms = {way: f"{stats.interval(values).value:.2f}" for way, values in samples.items()}
            ratios = [stats.ratio(samples[way], samples["drawn"]) for way in ("transformers", "greedy")]
            said = [f"{r.value:.2f}x [{r.low:.2f}, {r.high:.2f}]" for r in ratios]
            cells = (batch, kind, ms["drawn"], ms["transformers"], said[0], ms["greedy"], said[1])
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    model, _ = build_quantized(args.shape)
    context = PassContext(resolve_model(model), torch.device("cpu"), emit=lambda event: None)
    FuseKernels().apply(context).patch.enable()
    found = {}
    for batch in args.batches.split(","):
        prompt = torch.randint(3, 1000, (int(batch), DEPTH), generator=torch.Generator().manual_seed(0))
        found[batch] = measure(model, prompt, args.tokens, args.rounds)
    captured = environment.capture()
    text = (
        f"{args.shape}, int4, depth {DEPTH}, {torch.get_num_threads()} threads, {native.active_isa()}, {args.tokens} tokens, "
        f"{args.rounds} rounds\n\n{table(found)}\n"
    )
    print(text)
    if args.markdown:
        size = f"--batches {args.batches} --tokens {args.tokens} --rounds {args.rounds}"
        command = f"python benchmarks/sampled_decode.py --shape {args.shape} {size}"
        args.markdown.write_text(f"# Sampling, {args.shape}\n\n    {command}\n\n{text}")
    if args.json:
        args.json.write_text(json.dumps({"environment": captured, "samples": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
