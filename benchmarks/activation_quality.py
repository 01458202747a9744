"""What 8-bit activations add to 4-bit weights: mean KL of W4A8 over W4A16 on the bundled checkpoints.

    python benchmarks/activation_quality.py                        # formats of activations, for groups of 128
    python benchmarks/activation_quality.py --sites                # which linears the loss comes from
    python benchmarks/activation_quality.py --out FILE.md

The weights are those of quantize_gptq with its default options (8-bit head and embedding). Everything runs in float32:
the same packed weights, dequantized, and between them only the rounding of what the linears read. So W4A16 here has
exact activations, and the ratio of a row says what its format alone adds. "As it runs" is the same model on the compiled
kernels. KL is against the unquantized model on held-out text, in nats a token (`llmopt.measure.quality`).

A format is `bits/group`, with the scale from the largest magnitude of a token's group, or:

    +mse    the scale with the least squared error of ten below it
    +asym   a zero point a group (unsigned 8 bits)
    +2      the rounding error is quantized again: 16 bits in two passes
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmopt.measure import environment, quality
from llmopt.models import resolve_model
from llmopt.packed import QuantExperts, QuantLinear
from llmopt.passes.base import PassContext
from llmopt.passes.fuse_kernels import FuseKernels
from llmopt.passes.quantize_gptq import QuantizeGptq, calibrate
from llmopt.stages import EAGER, Stages

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny-qwen3", "tiny-ernie4_5_moe", "tiny-deepseek_v3")
FORMATS = ("8/128", "8/64", "8/32", "8/16", "8/128+mse", "8/32+mse", "8/128+asym", "8/32+asym", "8/128+2")
SITES = ("qkv", "attention output", "gate and up", "down", "head")
ROW_TOKENS = 256

Rounding = Callable[[torch.Tensor], torch.Tensor]


def rounding(form: str) -> Rounding:
    """The rounding of activations ``[T, K]`` that a format stands for."""
    sizes, *options = form.split("+")
    bits, group = map(int, sizes.split("/"))
    top = 2.0 ** (bits - 1) - 1

    def symmetric(x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-36) / top
        if "mse" in options:
            best, error = step, torch.full_like(step, torch.inf)
            for i in range(10):
                tried = step * (1 - 0.02 * i)
                now = (x - (x / tried).round().clamp(-top - 1, top) * tried).square().sum(-1, keepdim=True)
                best, error = torch.where(now < error, tried, best), torch.minimum(now, error)
            step = best
        return (x / step).round().clamp(-top - 1, top) * step

    def asymmetric(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low).clamp(min=1e-36) / (2 * top + 1)
        zero = (-low / step).round()
        return ((x / step).round() + zero).clamp(0, 2 * top + 1).sub(zero) * step

    def rounded(x: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
        one = asymmetric if "asym" in options else symmetric
        y = one(padded)
        if "2" in options:
            y = y + one(padded - y)
        return y.flatten(-2)[..., : x.shape[-1]]

    return rounded


def site_of(name: str) -> str:
    """The kind of a packed module by its full name."""
    last = name.rpartition(".")[2]
    kinds = {"o_proj": SITES[1], "gate_proj": SITES[2], "up_proj": SITES[2], "down_proj": SITES[3], "lm_head": SITES[4]}
    return kinds.get(last, SITES[0])


@contextmanager
def simulated(model: nn.Module, round_at: Callable[[str], Rounding]) -> Iterator[None]:
    """Packed modules multiply in float32, with what they read rounded by their site's format."""
    changed: list[Any] = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                forward = _linear(module, round_at(site_of(name)))
            elif isinstance(module, QuantExperts):
                forward = _experts(module, round_at(SITES[2]), round_at(SITES[3]))
            else:
                continue
            module.forward = forward  # type: ignore[method-assign]
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _linear(module: QuantLinear, rounded: Rounding) -> Callable[..., torch.Tensor]:
    weight = module.dequantize()
    return lambda x: linear(rounded(x), weight, module.bias)


def _experts(module: QuantExperts, wide: Rounding, inner: Rounding) -> Callable[..., torch.Tensor]:
    gate_up, down = module.dequantize("gate_up"), module.dequantize("down")

    def forward(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out, read = torch.zeros_like(x), wide(x)
        for expert in index.unique().tolist():
            token, choice = torch.where(index == expert)
            gate, up = linear(read[token], gate_up[expert]).chunk(2, -1)
            y = linear(inner(silu(gate) * up), down[expert])
            out.index_add_(0, token, y * weights[token, choice, None])
        return out

    return forward


class Subject:
    """One checkpoint in float32 with packed weights, and the logits of the unquantized model."""

    def __init__(self, name: str, num_rows: int, options: dict[str, Any]) -> None:
        self.name = name
        model = AutoModelForCausalLM.from_pretrained(ROOT / "assets" / name, dtype=torch.float32, local_files_only=True)
        self.model: Any = Stages(model.eval()).show((), EAGER)
        self.resolved = resolve_model(self.model)
        text = (ROOT / "assets" / "heldout.txt").read_text(encoding="utf-8")
        ids = torch.stack(calibrate.rows(text, self.model, num_rows=num_rows, row_tokens=ROW_TOKENS))
        self.reference = quality.reference(self.resolved, ids)
        ctx = PassContext(
            self.resolved, torch.device("cpu"), lambda event: None,
            calibration=calibrate.rows(None, self.model, row_tokens=ROW_TOKENS),
        )  # fmt: skip
        QuantizeGptq(**options).apply(ctx).patch.enable()
        self.fused = FuseKernels().apply(ctx).patch

    def kl(self, round_at: Callable[[str], Rounding]) -> float:
        with simulated(self.model, round_at):
            return quality.compare(self.resolved, self.reference).mean_kl

    def kl_as_it_runs(self) -> float:
        self.fused.enable()
        try:
            return quality.compare(self.resolved, self.reference).mean_kl
        finally:
            self.fused.disable()


def exact(x: torch.Tensor) -> torch.Tensor:
    return x


def measure(subject: Subject, formats: list[str], by_site: bool) -> Iterator[tuple[str, float]]:
    """Lines of one model: what is rounded how, and the mean KL."""
    yield "exact (W4A16)", subject.kl(lambda site: exact)
    yield "as it runs", subject.kl_as_it_runs()
    for form in formats:
        rounded = rounding(form)
        yield form, subject.kl(lambda site, r=rounded: r)  # type: ignore[misc]
        for only in SITES if by_site else ():
            yield f"{form}, {only}", subject.kl(lambda site, r=rounded, o=only: r if site == o else exact)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="BITS/GROUP[+OPTION]")
    parser.add_argument("--options", type=json.loads, default={}, help="of quantize_gptq, as JSON")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of 256 tokens; default 64")
    parser.add_argument("--sites", action="store_true", help="also each kind of linear alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, as Markdown")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    lines = ["| model | activations | mean KL | over W4A16 |", "| --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    for name in arguments.models:
        subject, base = Subject(name, arguments.rows, arguments.options), 0.0
        for label, kl in measure(subject, arguments.formats, arguments.sites):
            base = base or kl
            lines.append(f"| {name} | {label} | {kl:.6f} | {kl / base:.3f} |")
            print(lines[-1], flush=True)
    if arguments.out:
        seen = environment.capture()
        where = f"{seen['cpu']['model']}, {seen['threads']} threads, kernels {seen['kernels']['isa']}"
        head = f"# What 8-bit activations add\n\n{where}\n\n    python {shlex.join(sys.argv)}\n\n"
        arguments.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
