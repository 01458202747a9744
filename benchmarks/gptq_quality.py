"""Quality of 4-bit weights on the bundled checkpoints: round-to-nearest, llmopt's GPTQ, and a peer's checkpoint.

    python benchmarks/gptq_quality.py                            # print the table, for groups 64 and 128
    python benchmarks/gptq_quality.py --peer DIR [--peer DIR]    # with checkpoints that GPTQModel made
    python benchmarks/gptq_quality.py --out benchmarks/results   # and write it, dated, as Markdown and JSON

Calibration is the text that ships with llmopt, evaluation `assets/heldout.txt`, in rows of 256 tokens; head and embedding
stay as they are, so that only the 4-bit weights speak.  Dequantized weights run in a float32 copy of the model, because
bf16 arithmetic alone costs up to a fifth of the KL to be compared (its own line says how much).  "As it runs" is the
optimized bf16 model, whose kernels also round activations to 8 bits, against the bf16 model.  KL is in nats a token;
intervals are 95%, by bootstrap over paired rows.

A peer's checkpoint is made from the same calibration rows.  `--write-calibration FILE` writes them (safetensors, one
`[N, T]` int64 tensor a model); then, in an environment of its own:

    rows = safetensors.torch.load_file(FILE)["tiny-qwen3"]
    config = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False)
    model = GPTQModel.load("assets/tiny-qwen3", config, device="cpu")
    model.quantize([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows], batch_size=1)
    model.save(DIR)

GPTQModel 7.7.0 fails on ERNIE's MoE class in its own replacement of the model's forward; it runs with
`gptqmodel.models.definitions.ernie4_5_moe.Ernie4_5_MoeQModel.require_monkeypatch = False` set before `load`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmopt.checkpoint import gptq_format
from llmopt.checkpoint.names import expert_name, expert_projections, fused_names
from llmopt.measure import environment
from llmopt.models import resolve_model
from llmopt.models.base import ExpertsSite, ResolvedModel
from llmopt.packed import QuantExperts, QuantLinear
from llmopt.passes.base import Applied, PassContext
from llmopt.passes.quantize_gptq import QuantizeGptq, calibrate
from llmopt.passes.quantize_gptq.rounding import Grid, round_to_nearest
from llmopt.passes.quantize_gptq.solver import Solution
from llmopt.stages import EAGER, Stages

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny-qwen3", "tiny-ernie4_5_moe", "tiny-deepseek_v3")
ROW_TOKENS, BATCH_ROWS, RESAMPLES = 256, 8, 2000
PARTS = ("qweight", "qzeros", "scales", "g_idx")

Weights = dict[str, torch.Tensor]  # parameter of the model -> dequantized value
Ratio = tuple[float, float, float]  # value, and its interval


@dataclass(slots=True)
class Row:
    """One line of the table."""

    model: str
    group_size: int | None
    method: str
    arithmetic: str  # of activations: "fp32", "bf16", or "int8" inside the linears
    kl: float
    top1: float
    perplexity_ratio: float
    over_rtn: Ratio | None = None  # KL over round-to-nearest's in the same arithmetic
    over_peer: Ratio | None = None  # KL over the peer's, of the same modules
    solve_s: float | None = None


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model does on the held-out rows, against the reference."""

    kl: np.ndarray  # [rows], mean over the row's tokens
    top1: float
    perplexity_ratio: float

    def over(self, other: Outputs) -> Ratio:
        """Ratio of mean KLs, with its interval."""
        picks = np.random.default_rng(0).integers(0, len(self.kl), size=(RESAMPLES, len(self.kl)))
        low, high = np.percentile(self.kl[picks].mean(1) / other.kl[picks].mean(1), [2.5, 97.5])
        return float(self.kl.mean() / other.kl.mean()), float(low), float(high)


class Reference:
    """Log-probabilities of an untouched model on the held-out rows, to compare others with."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.ids = ids.split(BATCH_ROWS)
        self.base = [logits.log_softmax(-1) for logits in self._logits(model)]

    @torch.no_grad()
    def _logits(self, model: Any) -> Iterator[torch.Tensor]:
        for ids in self.ids:
            yield model(input_ids=ids, use_cache=False).logits.float()

    def compare(self, model: Any) -> Outputs:
        kl, agree, nll = [], [], []
        for base, logits, ids in zip(self.base, self._logits(model), self.ids, strict=True):
            now = logits.log_softmax(-1)
            kl.append((base.exp() * (base - now)).sum(-1).double().mean(-1))
            agree.append((base.argmax(-1) == now.argmax(-1)).double().mean(-1))
            nll.append((base - now)[:, :-1].gather(-1, ids[:, 1:, None]).double().mean((1, 2)))
        return Outputs(torch.cat(kl).numpy(), float(torch.cat(agree).mean()), math.exp(float(torch.cat(nll).mean())))


class Subject:
    """One checkpoint: as it is (bf16), a float32 copy to put weights into, and what both are measured against."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.name = name
        self.model, self.copy = _load(name, torch.bfloat16), _load(name, torch.float32)
        self.resolved = resolve_model(self.model)
        self.calibration = calibrate.rows(None, self.model, row_tokens=ROW_TOKENS)
        text = (ROOT / "assets" / "heldout.txt").read_text(encoding="utf-8")
        ids = torch.stack(calibrate.rows(text, self.model, num_rows=num_rows, row_tokens=ROW_TOKENS))
        self.fp32, self.bf16 = Reference(self.copy, ids), Reference(self.model, ids)

    def weights_alone(self, weights: Weights) -> Outputs:
        """The effect of these weights, everything else exact."""
        with weights_in(self.copy, weights):
            return self.fp32.compare(self.copy)

    def gptq(self, group_size: int, skip: tuple[str, ...] = (), *, with_kept: bool = False) -> Applied:
        """llmopt's pass; ``with_kept`` also quantizes what it leaves in the model's dtype."""
        resolved = _with_kept(self.resolved) if with_kept else self.resolved
        ctx = PassContext(resolved, torch.device("cpu"), lambda event: None, calibration=self.calibration)
        return QuantizeGptq(group_size=group_size, head_bits=None, skip=skip).apply(ctx)


def _load(name: str, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "assets" / name, dtype=dtype, local_files_only=True).eval()
    return Stages(model).show((), EAGER)


def _with_kept(resolved: ResolvedModel) -> ResolvedModel:
    """Linears that llmopt keeps in the model's dtype read what the first stage reads, and are solved with it."""
    layers = tuple(
        dataclasses.replace(x, stages=((*x.stages[0], *x.kept), *x.stages[1:]), kept=()) for x in resolved.layers
    )
    return dataclasses.replace(resolved, layers=layers)


@contextmanager
def weights_in(model: Any, weights: Weights) -> Iterator[None]:
    """The model with these weights; the old ones come back on exit."""
    parameters = dict(model.named_parameters())
    old = {name: parameters[name].detach().clone() for name in weights}
    try:
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in old.items():
                parameters[name].copy_(value)


def nearest(resolved: ResolvedModel, group_size: int, *, search: bool) -> Weights:
    """What the pass quantizes, rounded to nearest; ``search`` picks scales by squared error, not the largest weight."""
    weights: Weights = {}
    for layer in resolved.layers:
        weights |= {f"{s.name}.weight": s.module.weight for s in layer.linears()}
        if (site := layer.experts) is not None:
            weights |= dict(zip(fused_names(site), (site.gate_up, site.down), strict=True))
    out: Weights = {}
    for name, weight in weights.items():
        q, scales, zeros = round_to_nearest(weight.detach(), Grid(4, True), group_size, search=search)
        out[name] = Solution(q, scales, zeros, torch.zeros(1), 0.0).dequantized(group_size)
    return out


def dequantized(resolved: ResolvedModel, applied: Applied) -> Weights:
    """The weights that the packed modules of a patch stand for."""
    parameters: dict[tuple[int, str], tuple[str, ...]] = {}
    for layer in resolved.layers:
        for site in (*layer.linears(), *layer.kept):
            parameters[id(site.parent), site.attr] = (f"{site.name}.weight",)
        if layer.experts is not None:
            parameters[id(layer.experts.parent), layer.experts.attr] = fused_names(layer.experts)
    out: Weights = {}
    for swap in applied.patch.swaps:
        names, module = parameters[id(swap.owner), swap.attr], swap.after
        if isinstance(module, QuantExperts):
            out |= dict(zip(names, (module.dequantize("gate_up"), module.dequantize("down")), strict=True))
        else:
            assert isinstance(module, QuantLinear)
            out[names[0]] = module.dequantize()
    return out


class Peer:
    """A checkpoint in the GPTQ format (v1, experts unfused), read by the format's definition alone.

    Args:
        directory: with config.json, quantize_config.json and model.safetensors.
        resolved: the model that it was made from.
    """

    def __init__(self, directory: Path, resolved: ResolvedModel) -> None:
        settings = json.loads((directory / "quantize_config.json").read_text(encoding="utf-8"))
        self.label = str(settings["meta"]["quantizer"][0])
        self.settings = {k: settings[k] for k in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")}
        self.settings |= {k: settings["meta"].get(k) for k in ("damp_percent", "act_group_aware", "true_sequential")}
        self.weights: Weights = {}
        self.left: list[str] = []  # linears and experts not quantized
        kept = {site.name for layer in resolved.layers for site in layer.kept}
        with safe_open(directory / "model.safetensors", "pt") as file:
            self._file, self._names = file, set(file.keys())
            for layer in resolved.layers:
                for site in (*layer.linears(), *layer.kept):
                    weight = self._linear(site.name)
                    if weight is not None:
                        self.weights[f"{site.name}.weight"] = weight
                    elif site.name not in kept:
                        self.left.append(site.name)
                if layer.experts is not None:
                    self._experts(resolved, layer.experts)
        self.beyond = sorted(name for name in kept if f"{name}.weight" in self.weights)  # llmopt keeps these

    def _linear(self, name: str) -> torch.Tensor | None:
        if f"{name}.qweight" not in self._names:
            return None
        tensors = gptq_format.GptqTensors(*(self._file.get_tensor(f"{name}.{part}") for part in PARTS))
        codes = gptq_format.unpack(tensors, bits=int(self.settings["bits"]))
        group = codes.g_idx.long()
        return (codes.q.float() - codes.zeros.float()[:, group]) * codes.scales.float()[:, group]

    def _experts(self, resolved: ResolvedModel, site: ExpertsSite) -> None:
        count = site.down.shape[0]
        projections = expert_projections(resolved.family.mlp)
        names = [expert_name(site.name, site.spec, e, p) for p in projections for e in range(count)]
        found = [weight for name in names if (weight := self._linear(name)) is not None]
        if not found:
            self.left.append(site.name)
            return
        if len(found) < len(names):
            sys.exit(
                f"{site.name}: {len(found)} of {len(names)} linears quantized: llmopt has no such set to compare with"
            )
        gate, up, down = (torch.stack(found[i * count : (i + 1) * count]) for i in range(3))
        self.weights |= dict(zip(fused_names(site), (torch.cat([gate, up], 1), down), strict=True))


def measure(subject: Subject, group_size: int, peer: Peer | None) -> Iterator[Row]:
    """The lines of one checkpoint and group size."""
    rtn = nearest(subject.resolved, group_size, search=False)
    base = subject.weights_alone(rtn)
    with weights_in(subject.model, rtn):
        base_bf16 = subject.bf16.compare(subject.model)

    def row(method: str, out: Outputs, **more: Any) -> Row:
        more = {"arithmetic": "fp32", "over_rtn": out.over(base)} | more
        return Row(subject.name, group_size, method, kl=float(out.kl.mean()), top1=out.top1,
                   perplexity_ratio=out.perplexity_ratio, **more)  # fmt: skip

    yield row("round to nearest", base)
    best = nearest(subject.resolved, group_size, search=True)
    yield row("round to nearest, scales by squared error", subject.weights_alone(best))
    applied = subject.gptq(group_size)
    ours = subject.weights_alone(dequantized(subject.resolved, applied))
    same = subject.weights_alone(peer.weights) if peer is not None and not (peer.left or peer.beyond) else None
    yield row("llmopt", ours, over_peer=ours.over(same) if same else None, solve_s=applied.details["solve_s"])
    applied.patch.enable()
    as_it_runs = subject.bf16.compare(subject.model)
    applied.patch.disable()
    yield row("llmopt, as it runs", as_it_runs, arithmetic="int8", over_rtn=as_it_runs.over(base_bf16))
    if peer is None:
        return
    theirs = subject.weights_alone(peer.weights)
    yield row(peer.label, theirs)
    if same is None:
        more = subject.gptq(group_size, tuple(peer.left), with_kept=bool(peer.beyond))
        ours = subject.weights_alone(dequantized(subject.resolved, more))
        yield row("llmopt, the peer's modules", ours, over_peer=ours.over(theirs), solve_s=more.details["solve_s"])


def cells(row: Row) -> list[str]:
    def ratio(value: Ratio | None) -> str:
        return "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"

    return [
        row.model, "" if row.group_size is None else str(row.group_size), row.method, row.arithmetic, f"{row.kl:.5f}",
        ratio(row.over_rtn), ratio(row.over_peer), f"{row.top1:.2%}", f"{row.perplexity_ratio:.4f}",
        "" if row.solve_s is None else f"{row.solve_s:.1f}",
    ]  # fmt: skip


HEADING = (
    "model", "group", "method", "arithmetic", "mean KL", "KL / nearest", "KL / peer", "top-1", "perplexity ratio",
    "solve s",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    lines = [HEADING, ["---"] * len(HEADING), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def notes(peers: dict[tuple[str, int], Peer]) -> list[str]:
    out = ["All symmetric, 4 bits. `KL / peer` compares the same modules."]
    for (model, group_size), peer in peers.items():
        said = ", ".join(f"{k}={v}" for k, v in peer.settings.items())
        differs = [f"it also quantizes {', '.join(peer.beyond)}, which llmopt keeps"] if peer.beyond else []
        differs += [f"it leaves {', '.join(peer.left)}"] if peer.left else []
        out.append(f"{peer.label} on {model}, group {group_size}: {said}; {'; '.join(differs) or 'same modules'}.")
    return out


def write(directory: Path, rows: Sequence[Row], said: Sequence[str], num_rows: int) -> None:
    """``quality_<date>.md`` and ``.json``."""
    seen = environment.capture()
    command = "python " + shlex.join(["benchmarks/gptq_quality.py", *sys.argv[1:]])
    settings = {"held_out_rows": num_rows, "row_tokens": ROW_TOKENS, "calibration": "packaged text", "command": command}
    lines = list(map(dataclasses.asdict, rows))
    record = {"environment": seen, "settings": settings, "notes": list(said), "rows": lines}
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"quality_{seen['date'][:10]}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    where = f"{seen['cpu']['model']}, {seen['threads']} threads, kernels {seen['kernels']['isa']}"
    versions = ", ".join(f"{k} {v}" for k, v in seen["versions"].items())
    stem.with_suffix(".md").write_text(
        f"# Quality of 4-bit weights, {seen['date'][:10]}\n\n{where}; {versions}\n\n    {command}\n\n"
        f"Held-out: {num_rows} rows of {ROW_TOKENS} tokens. The script says what is measured and how a peer's checkpoint"
        f" is made.\n\n{table(rows)}\n\n" + "\n".join(f"- {line}" for line in said) + "\n",
        encoding="utf-8",
    )


def write_calibration(path: Path, models: Sequence[str]) -> None:
    rows = {n: torch.stack(calibrate.rows(None, _load(n, torch.bfloat16), row_tokens=ROW_TOKENS)) for n in models}
    save_file(rows, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--groups", nargs="+", type=int, choices=(32, 64, 128, -1), default=[64, 128])
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of 256 tokens; default 128")
    parser.add_argument("--peer", action="append", type=Path, default=[], metavar="DIR", help="a GPTQModel checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write quality_<date>.md and .json there")
    parser.add_argument("--write-calibration", type=Path, metavar="FILE", help="write the calibration rows and stop")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if arguments.write_calibration:
        return write_calibration(arguments.write_calibration, arguments.models)
    rows: list[Row] = []
    peers: dict[tuple[str, int], Peer] = {}
    print(table([]), flush=True)
    for name in arguments.models:
        subject = Subject(name, arguments.rows)
        peers |= {(name, int(p.settings["group_size"])): p for p in _peers(arguments.peer, subject.resolved)}
        out = subject.fp32.compare(subject.model)
        rows.append(Row(name, None, "none", "bf16", float(out.kl.mean()), out.top1, out.perplexity_ratio))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        for group_size in arguments.groups:
            for row in measure(subject, group_size, peers.get((name, group_size))):
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
    said = notes(peers)
    print("\n" + "\n".join(said))
    if arguments.out:
        write(arguments.out, rows, said, arguments.rows)


def _peers(directories: Sequence[Path], resolved: ResolvedModel) -> Iterator[Peer]:
    for directory in directories:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == resolved.family.model_type:
            yield Peer(directory, resolved)


if __name__ == "__main__":
    main()
