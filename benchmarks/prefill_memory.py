"""Memory that a long prompt takes beside the weights and its KV cache.

    python benchmarks/prefill_memory.py [--shape qwen3-0.6b] [--tokens 32768] [--json FILE]

Random int4 weights of the shape, fused; one token is generated from a prompt of so many. What is resident before it, after a
short prompt, and the bytes by which the cache grows are taken off the peak.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from llmopt.measure import environment, memory, traffic
from llmopt.models import resolve_model, shapes
from llmopt.passes import FuseKernels
from llmopt.passes.base import PassContext
from llmopt.passes.quantize_gptq.direct import build_quantized

_SHORT = 600  # tokens of the prompt that warms up


def generate(model: Any, tokens: int) -> float:
    """Seconds of one token from a prompt of ``tokens``."""
    prompt = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, _ = build_quantized(args.shape)
    resolved = resolve_model(model)
    FuseKernels().apply(PassContext(resolved, torch.device("cpu"), emit=lambda event: None)).patch.enable()
    generate(model, _SHORT)
    before = memory.current_rss().value
    if before is None or not memory.peak_rss_reset():
        parser.exit(1, f"the system does not count it: {memory.current_rss().how}\n")
    seconds = generate(model, args.tokens)
    # the short prompt's cache is freed first
    peak, cache = memory.peak_rss().value, traffic.kv_bytes(resolved, args.tokens) - traffic.kv_bytes(resolved, _SHORT)
    assert peak is not None
    rest = peak - before - cache
    print(f"{args.shape}, {args.tokens} tokens in {seconds:.1f} s: peak {peak / 1e9:.2f} GB, resident before "
          f"{before / 1e9:.2f}, cache {cache / 1e9:.2f} more, the rest {rest / 1e9:.3f} GB")  # fmt: skip
    if args.json:
        figures = {"seconds": seconds, "peak": peak, "before": before, "cache": cache, "rest": rest}
        args.json.write_text(json.dumps({"environment": environment.capture(), "bytes": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
