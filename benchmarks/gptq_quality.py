"""Quality of 4-bit weights on the bundled checkpoints: round-to-nearest, GPTQ of llmopt, and a peer's GPTQ checkpoint.

    python benchmarks/gptq_quality.py                            # the table, for groups 64 and 128
    python benchmarks/gptq_quality.py --peer DIR [--peer DIR]    # with checkpoints that GPTQModel made
    python benchmarks/gptq_quality.py --out benchmarks/results   # and as dated Markdown and JSON

Calibration is the text that ships with llmopt, evaluation `assets/heldout.txt`, in rows of 256 tokens; head and
embedding stay in bf16 so that only the 4-bit weights speak.  "W4A16" rows put dequantized weights into the bf16 model;
"as it runs" is the optimized model itself, whose kernels also round activations to 8 bits.  KL is in nats a token,
from the bf16 model's distribution; intervals are 95%, by bootstrap over paired rows.

A peer's checkpoint comes from the same calibration rows.  `--write-calibration FILE` writes them (safetensors, one
`[N, T]` int64 tensor a model); then, in an environment of its own:

    rows = safetensors.torch.load_file(FILE)["tiny-qwen3"]
    model = GPTQModel.load("assets/tiny-qwen3", QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False), device="cpu")
    model.quantize([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows], batch_size=1)
    model.save(DIR)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt.checkpoint import gptq_format
from llmopt.checkpoint.names import expert_name, expert_projections
from llmopt.measure import environment
from llmopt.models import resolve_model
from llmopt.models.base import ExpertsSite, ResolvedModel
from llmopt.passes.base import Applied, PassContext
from llmopt.passes.quantize_gptq import QuantizeGptq, calibrate
from llmopt.passes.quantize_gptq.linear import QuantExperts, QuantLinear
from llmopt.passes.quantize_gptq.rounding import Grid, round_to_nearest
from llmopt.passes.quantize_gptq.solver import Solution
from llmopt.stages import EAGER, Stages

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny-qwen3", "tiny-ernie4_5_moe", "tiny-deepseek_v3")
ROW_TOKENS = 256
BATCH_ROWS = 8
RESAMPLES = 2000

Weights = dict[str, torch.Tensor]  # parameter of the model -> dequantized value


@dataclass(slots=True)
class Row:
    """One line of the table."""

    model: str
    group_size: int
    method: str
    modules: int  # linears replaced; of fused experts each counts its own three
    kl: float
    kl_low: float
    kl_high: float
    top1: float
    perplexity_ratio: float
    solve_s: float | None = None
    kl_over: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # method -> ratio, its interval


@dataclass(slots=True)
class Outputs:
    """What one variant of a model does on the held-out rows."""

    kl: np.ndarray  # [rows] mean over the row's tokens
    agree: float
    nll: float


class HeldOut:
    """The held-out rows and the bf16 model's log-probabilities on them."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.base = [b.log_softmax(-1) for b in self._logits()]
        self.nll = float(np.mean([_nll(b, i) for b, i in zip(self.base, ids.split(BATCH_ROWS), strict=True)]))

    def _logits(self) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            for ids in self.ids.split(BATCH_ROWS):
                yield self.model(input_ids=ids, use_cache=False).logits.float()

    def measure(self) -> Outputs:
        kl, agree, nll = [], [], []
        for base, logits, ids in zip(self.base, self._logits(), self.ids.split(BATCH_ROWS), strict=True):
            now = logits.log_softmax(-1)
            kl.append((base.exp() * (base - now)).sum(-1).double().mean(-1))
            agree.append((base.argmax(-1) == now.argmax(-1)).double().mean(-1))
            nll.append(_nll(now, ids))
        return Outputs(torch.cat(kl).numpy(), float(torch.cat(agree).mean()), float(np.mean(nll)))


def _nll(log_probs: torch.Tensor, ids: torch.Tensor) -> float:
    return float(-log_probs[:, :-1].gather(-1, ids[:, 1:, None]).mean())


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], rows: int) -> tuple[float, float]:
    """95% interval of a statistic that takes row indices ``[resamples, rows]``."""
    picks = np.random.default_rng(0).integers(0, rows, size=(RESAMPLES, rows))
    low, high = np.percentile(statistic(picks), [2.5, 97.5])
    return float(low), float(high)


def ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``a`` over mean of ``b``, paired rows, with its interval."""
    low, high = bootstrap(lambda p: a[p].mean(1) / b[p].mean(1), len(a))
    return float(a.mean() / b.mean()), low, high


@contextmanager
def weights_in(model: Any, weights: Weights) -> Iterator[None]:
    """The model with these weights, rounded to its dtype; the old ones come back on exit."""
    parameters = dict(model.named_parameters())
    old = {name: parameters[name].detach().clone() for name in weights}
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in old.items():
                parameters[name].copy_(value)


def fused(site: ExpertsSite) -> tuple[str, str]:
    return f"{site.name}.{site.spec.gate_up}", f"{site.name}.{site.spec.down}"


def quantizable(resolved: ResolvedModel) -> Weights:
    """Every weight the pass quantizes, by parameter name."""
    found: Weights = {}
    for layer in resolved.layers:
        found |= {f"{s.name}.weight": s.module.weight for s in layer.linears()}
        if layer.experts is not None:
            found |= dict(zip(fused(layer.experts), (layer.experts.gate_up, layer.experts.down), strict=True))
    return found


def nearest(resolved: ResolvedModel, group_size: int, *, search: bool) -> Weights:
    """All of them rounded to nearest; ``search`` picks scales by squared error instead of by the largest weight."""
    out: Weights = {}
    for name, weight in quantizable(resolved).items():
        q, scales, zeros = round_to_nearest(weight.detach(), Grid(4, True), group_size, search=search)
        out[name] = Solution(q, scales, zeros, torch.zeros(1), 0.0).dequantized(group_size)
    return out


def gptq(resolved: ResolvedModel, rows: list[torch.Tensor], group_size: int, skip: tuple[str, ...] = ()) -> Applied:
    ctx = PassContext(resolved, torch.device("cpu"), lambda event: None, calibration=rows)
    return QuantizeGptq(group_size=group_size, head_bits=None, skip=skip).apply(ctx)


def dequantized(resolved: ResolvedModel, applied: Applied) -> Weights:
    """The weights that the packed modules of a patch stand for."""
    names: dict[tuple[int, str], Any] = {}
    for layer in resolved.layers:
        names |= {(id(s.parent), s.attr): s.name for s in layer.linears()}
        if layer.experts is not None:
            names[id(layer.experts.parent), layer.experts.attr] = layer.experts
    out: Weights = {}
    for swap in applied.patch.swaps:
        where, module = names[id(swap.owner), swap.attr], swap.after
        if isinstance(module, QuantExperts):
            out |= dict(zip(fused(where), (module.dequantize("gate_up"), module.dequantize("down")), strict=True))
        else:
            assert isinstance(module, QuantLinear)
            out[f"{where}.weight"] = module.dequantize()
    return out
