"""Chooses the attention implementation by measuring: the fastest correct one at the model's own shapes."""

from __future__ import annotations

import importlib.util
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmopt import native
from llmopt.passes.swap_flash_attention.forward import CANDIDATES, Candidate, dense_mask

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model's attention."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Winners, and what was measured: times in microseconds by situation and candidate."""

    prefill: str
    decode: str
    times_us: dict[str, dict[str, float]]
    rejected: dict[str, str]


def available(device: torch.device) -> dict[str, str]:
    """Candidates of this machine: name -> '' or why it cannot run."""
    cpu = device.type == "cpu"
    no_kernels = "" if native.available() else "the compiled kernels are not installed"
    no_package = "" if importlib.util.find_spec("flash_attn") else "the flash-attn package is not installed"
    return {
        "llmopt": no_kernels if cpu else "runs on the CPU",
        "sdpa": "",
        "flash_attn": "runs on CUDA" if cpu else no_package,
    }


def shape_of(config: Any, kind: str) -> Shape:
    heads = config.num_attention_heads
    if kind == "mla":
        return Shape(heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(heads, config.num_key_value_heads, head_dim, head_dim)


def choose(
    names: list[str], module: nn.Module, shape: Shape, dtype: torch.dtype, device: torch.device, prompt: int
) -> Choice:
    """Check every candidate against fp32 eager attention, then time the correct ones in turn."""
    times: dict[str, dict[str, float]] = {}
    rejected: dict[str, str] = {}
    for name in names:
        if reason := _wrong(CANDIDATES[name], module, shape, dtype, device):
            rejected[name] = reason
    fit = [n for n in names if n not in rejected]
    situations = {"prefill": [(prompt, prompt), (1024, 1024)], "decode": [(1, prompt), (1, 4096)]}
    winners = {}
    for situation, sizes in situations.items():
        totals = dict.fromkeys(fit, 0.0)
        for q_length, kv_length in sizes:
            measured = _time(fit, module, _inputs(shape, q_length, kv_length, dtype, device), device)
            times[f"{situation} {q_length} x {kv_length}"] = {n: round(t * 1e6, 1) for n, t in measured.items()}
            # each size counts alike, whatever it takes
            for n in fit:
                totals[n] += measured[n] / min(measured.values())
        winners[situation] = min(totals, key=lambda n: totals[n]) if totals else ""
    return Choice(winners["prefill"], winners["decode"], times, rejected)


def _inputs(
    shape: Shape, q_length: int, kv_length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(q_length + kv_length)

    def make(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(1, heads, length, dim, generator=g).to(device, dtype)

    return (
        make(shape.heads, q_length, shape.qk_dim),
        make(shape.kv_heads, kv_length, shape.qk_dim),
        make(shape.kv_heads, kv_length, shape.v_dim),
    )


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    seen = dense_mask(None, q.shape[2], k.shape[2]).to(q.device)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def _wrong(run: Candidate, module: nn.Module, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """FlashAttention's own rule: no further from fp32 than twice what plain attention in this dtype is."""
    for q_length, kv_length in ((65, 65), (1, 131), (7, 40)):
        q, k, v = _inputs(shape, q_length, kv_length, dtype, device)
        scale = shape.qk_dim**-0.5
        truth = _eager(q.float(), k.float(), v.float(), scale)
        allowed = 2 * float((_eager(q, k, v, scale).float() - truth).abs().max()) + 1e-5
        error = float((run(module, q, k, v, None, scale).float() - truth).abs().max())
        if not error <= allowed:
            return f"wrong by {error:.3g} at {q_length} x {kv_length}, allowed {allowed:.3g}"
    return ""


def _time(
    names: list[str], module: nn.Module, inputs: tuple[torch.Tensor, ...], device: torch.device
) -> dict[str, float]:
    """Median seconds of a call, candidates in turn."""
    q, k, v = inputs
    scale = q.shape[-1] ** -0.5
    samples: dict[str, list[float]] = {n: [] for n in names}
    for done in range(_REPEATS + 1):
        for name in names:
            _wait(device)
            started = time.perf_counter()
            CANDIDATES[name](module, q, k, v, None, scale)
            _wait(device)
            if done:  # the first call warms up
                samples[name].append(time.perf_counter() - started)
    return {n: statistics.median(s) for n, s in samples.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
