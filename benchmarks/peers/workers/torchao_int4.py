"""torchao's int4 weight-only linears under torch.compile, over a static cache, as its documentation recommends.

    python -m benchmarks.peers.workers.torchao_int4 SHAPE SEQUENCES,SEQUENCES...

The head is a linear, so it becomes int4 as well; the embedding stays bf16. The prompt runs through the same compiled
forward as the tokens after it; dynamic shapes, so that one compilation serves every depth. What each number of sequences
needs is compiled before the worker says that it is ready, which takes minutes.
"""

from __future__ import annotations

import sys
import time
from importlib import metadata
from typing import Any

import torch
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
from transformers import StaticCache

from benchmarks.peers.workers import serve
from llmopt.models import shapes

GROUP_SIZE = 128
_COMPILE_AT = (64, 96)  # a second depth shows the compiler that depths vary


class TorchaoEngine:
    """A compiled forward, fed greedily."""

    def __init__(self, model: Any) -> None:
        self.model, self._weights = model, weights_of(model)
        self._forward = torch.compile(model.forward, dynamic=True)
        self._generator = torch.Generator().manual_seed(0)

    def info(self) -> dict[str, Any]:
        versions = {name: metadata.version(name) for name in ("torch", "torchao", "transformers")}
        return {"versions": versions, "group_size": GROUP_SIZE, "compile": "dynamic", "cache": "static",
                "weights": self._weights}  # fmt: skip

    @torch.no_grad()
    def run(self, depth: int, tokens: int, sequences: int) -> tuple[float, float]:
        ids = torch.randint(3, self.model.config.vocab_size, (sequences, depth), generator=self._generator)
        cache = StaticCache(config=self.model.config, max_cache_len=depth + tokens)
        started = time.perf_counter()
        ids = self._step(ids, cache)
        read = time.perf_counter()
        for _ in range(tokens):
            ids = self._step(ids, cache)
        return read - started, time.perf_counter() - read

    def _step(self, ids: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        out = self._forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen: torch.Tensor = out.logits[:, -1:].argmax(-1)
        return chosen


def weights_of(model: Any) -> list[dict[str, Any]]:
    """What is stored, by role."""
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        role = "head" if name == "lm_head" else "embedding" if "embed_tokens" in name else "linear"
        if weight.ndim < 2:
            role = "other"
        if hasattr(weight, "qdata"):
            size = sum(t.numel() * t.element_size() for t in (weight.qdata, weight.scale_and_zero))
            found.append((role, f"int4 g{weight.block_size[-1]}", weight.numel(), size))
        else:
            kind = str(weight.dtype).removeprefix("torch.")
            found.append((role, kind, weight.numel(), weight.numel() * weight.element_size()))
    return serve.weight_rows(found)


def main() -> None:
    serve.die_with_parent()
    replies = serve.private_stdout()
    model = shapes.build(sys.argv[1])
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE))
    engine = TorchaoEngine(model)
    for sequences in filter(None, sys.argv[2].split(",")):
        for depth in _COMPILE_AT:
            engine.run(depth, 2, int(sequences))
    serve.serve(engine, replies)


if __name__ == "__main__":
    main()
