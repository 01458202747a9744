"""Contenders that run through transformers' generate: eager, stock, and llmopt.

    python -m benchmarks.peers.workers.hf eager|stock|llmopt SHAPE [all|PASS,PASS... [KV_DTYPE]]

SHAPE is a published shape or ``small``. llmopt runs every pass, unmeasured (nothing is undone then), and is timed through
``generate``. With quantize_gptq among the passes a published shape is built in int4 from random codes, as ``llmopt bench``
does for large ones: the same modules and kernels without the minutes that GPTQ takes, and it fits where bf16 does not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch

import llmopt
from benchmarks.peers.workers import serve
from llmopt import loop
from llmopt.measure import traffic
from llmopt.models import resolve_model, shapes
from llmopt.packed import QuantEmbedding, QuantExperts, QuantLinear
from llmopt.passes import FuseKernels, choose
from llmopt.passes.quantize_gptq import QuantizeGptq
from llmopt.passes.quantize_gptq.direct import build_quantized
from llmopt.stages import EAGER, STOCK, Stages

SMALL = "small"


class _Clock:
    """A streamer that keeps the time of every token."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        return None


class HfEngine:
    """Any transformers model, as a user of ``generate`` meets it."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.model, self.settings = model, settings
        self._generator = torch.Generator().manual_seed(0)

    def info(self) -> dict[str, Any]:
        versions = {name: metadata.version(name) for name in ("torch", "transformers")}
        return {"versions": versions, **self.settings, "weights": weights_of(self.model)}

    @torch.no_grad()
    def run(self, depth: int, tokens: int, sequences: int) -> tuple[float, float]:
        prompt = torch.randint(3, self.model.config.vocab_size, (sequences, depth), generator=self._generator)
        clock, count = _Clock(), tokens + 1
        started = time.perf_counter()
        self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, num_beams=1, streamer=clock, pad_token_id=0,
        )  # fmt: skip
        # the first stamp is of the prompt itself
        assert len(clock.stamps) == count + 1, f"{len(clock.stamps)} stamps for {count} tokens"
        return clock.stamps[1] - started, clock.stamps[-1] - clock.stamps[1]


def build_plain(shape: str) -> Any:
    """The unoptimized model in bfloat16."""
    return shapes.tiny_model("qwen3", dtype=torch.bfloat16) if shape == SMALL else shapes.build(shape)


def build_ours(shape: str, passes: Sequence[str] | None, kv_dtype: str | None = None) -> Any:
    chosen = [replace(item, kv_dtype=kv_dtype) if isinstance(item, FuseKernels) else item for item in choose(passes)]
    options = next((item for item in chosen if isinstance(item, QuantizeGptq)), None)
    if shape == SMALL or options is None:
        return llmopt.optimize(build_plain(shape), chosen, measure=False)
    model, applied = build_quantized(shape, group_size=options.group_size, head_bits=options.head_bits or 8)
    rest = [item for item in chosen if item is not options]
    return loop.optimize_built(model, (options, applied), rest, baseline=_NoBaseline(), measure=False)


class _NoBaseline:
    """Nothing is measured against it: that is the driver's business here."""

    note = ""
    weight_bytes: int | None = None
    parameters: int | None = None

    def ladder(self) -> dict[str, Any]:
        return {}

    def combine(self, samples: Any) -> Any:
        return samples

    def close(self) -> None:
        return None


def reads(model: Any) -> dict[str, int]:
    """Bytes that decoding one token needs: weights (of the experts those chosen), and cache per token of depth."""
    resolved = resolve_model(model)
    return {"weights": traffic.weight_bytes_per_token(resolved), "cache": traffic.kv_bytes(resolved, 1)}


def weights_of(model: Any) -> list[dict[str, Any]]:
    """What is stored, by role; tied tables count once."""
    resolved = resolve_model(model)
    head = getattr(resolved.head.parent, resolved.head.attr)
    parent, attr = resolved.parent_of_embedding()
    roles = {id(head): "head", id(getattr(parent, attr)): "embedding"}
    found, seen = [], set()
    # the head first: what it shares with the embedding is the head's
    for module in sorted(model.modules(), key=lambda m: m is not head):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        fresh = [t for t in tensors if t.data_ptr() not in seen]
        seen |= {t.data_ptr() for t in fresh}
        size = sum(t.numel() * t.element_size() for t in fresh)
        if size:
            found.append((roles.get(id(module)) or _role(module), *_format(module, fresh), size))
    return serve.weight_rows(found)


def _role(module: Any) -> str:
    if isinstance(module, QuantExperts) or "Experts" in type(module).__name__:
        return "experts"
    return "linear" if isinstance(module, torch.nn.Linear | QuantLinear) else "other"


def _format(module: Any, tensors: list[torch.Tensor]) -> tuple[str, int]:
    """Name of the format, and how many weights it holds."""
    if isinstance(module, QuantLinear):
        return f"int{module.bits} g{module.group_size}", module.in_features * module.out_features
    if isinstance(module, QuantEmbedding):
        return f"int{module.bits} g{module.group_size}", module.num_embeddings * module.embedding_dim
    if isinstance(module, QuantExperts):
        return f"int4 g{module.group_size}", 3 * module.num_experts * module.hidden_dim * module.intermediate_dim
    return str(tensors[0].dtype).removeprefix("torch."), sum(t.numel() for t in tensors)


def main() -> None:
    serve.die_with_parent()
    replies = serve.private_stdout()
    kind, shape = sys.argv[1:3]
    if kind == "llmopt":
        names, kv_dtype = [*sys.argv[3:], None, None][:2]
        model = build_ours(shape, names.split(",") if names and names != "all" else None, kv_dtype)
        kept = [{"name": row.name, "verdict": row.verdict, "reason": row.reason, "options": row.options}
                for row in llmopt.report(model).passes]  # fmt: skip
        settings: dict[str, Any] = {"llmopt": llmopt.__version__, "passes": kept, "reads": reads(model)}
    else:
        model = build_plain(shape)
        implementations = {"eager": EAGER, "stock": STOCK}[kind]
        Stages(model).show((), implementations)
        settings = {"attention": implementations[0], "experts": implementations[1]}
    serve.serve(HfEngine(model, settings), replies)


if __name__ == "__main__":
    main()
