"""Chooses the attention implementation by measuring: the fastest correct one at the model's own shapes."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llmopt.errors import PassError
from llmopt.ops.attention import MANY_QUERIES
from llmopt.ops.device import LEAST_CAPABILITY, kernels_for
from llmopt.passes.swap_flash_attention.forward import CANDIDATES, KERNEL_DTYPES
from llmopt.passes.swap_flash_attention.masks import Seen
from llmopt.passes.swap_flash_attention.mla import LatentAttention

# of each pair of sizes: rounds, and the time after which no further round is begun
_ROUNDS, _BUDGET_S = 5, 0.35
_LONG_PROMPT, _DEPTH = 1024, 4096
# where the absorbed and the expanded form of latent attention are compared
_CROSSING_QUERIES, _CROSSING_KEYS = (1, 32), 1024

_NO_CROSSING = 2**31

Run = Callable[[], torch.Tensor]


def cannot_run() -> tuple[type[Exception], ...]:
    """What an implementation raises that does not run here."""
    if importlib.util.find_spec("triton") is None:
        return RuntimeError, ImportError
    from triton.errors import TritonError

    return RuntimeError, ImportError, TritonError


@dataclass(slots=True)
class Choice:
    """Winners, and what was measured: times in microseconds by situation and candidate."""

    prefill: str
    decode: str
    times_us: dict[str, dict[str, float]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


def available(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Candidates here: name -> '' or why it cannot run."""
    wrong = "" if dtype in KERNEL_DTYPES else f"takes float32, bfloat16 and float16, not {dtype}"
    if device.type == "cpu":
        own = wrong if kernels_for("cpu") else "the compiled kernels are not installed"
        return {"llmopt": own, "sdpa": "", "cudnn": "runs on CUDA", "flash_attn": "runs on CUDA"}
    own = (
        wrong
        if kernels_for("cuda")
        else f"needs Triton and GPUs of compute capability {LEAST_CAPABILITY[0]}.0 or later"
    )
    half = "" if dtype in (torch.bfloat16, torch.float16) else f"takes bfloat16 and float16, not {dtype}"
    missing = importlib.util.find_spec("flash_attn") is None
    package = "the flash-attn package is not installed" if missing else half
    cudnn = half if torch.backends.cudnn.is_available() else "torch has no cuDNN here"
    return {"llmopt": own, "sdpa": "", "cudnn": cudnn, "flash_attn": package}


class Bench:
    """Calls of one attention module at given sizes, on random inputs.

    Args:
        module: the attention module, as transformers made it.
        latent: its latent form, or None for grouped-query attention.
        config: of the model.
        dtype, device: of the inputs.
    """

    def __init__(
        self, module: Any, latent: LatentAttention | None, config: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.module, self.latent, self.dtype, self.device = module, latent, dtype, device
        self.scale: float = module.scaling
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = self.heads // module.num_key_value_groups
        if hasattr(module, "qk_head_dim"):
            self.qk_dim, self.v_dim = int(module.qk_head_dim), int(module.v_head_dim)
        else:
            self.qk_dim = self.v_dim = int(module.head_dim)

    def inputs(self, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value; with a latent form, query, latent and rope key."""
        g = torch.Generator().manual_seed(queries + keys)

        def normal(heads: int, tokens: int, dim: int) -> torch.Tensor:
            return torch.randn(1, heads, tokens, dim, generator=g).to(self.device, self.dtype)

        q = normal(self.heads, queries, self.qk_dim)
        if self.latent is not None:
            return q, normal(1, keys, self.latent.rank), normal(1, keys, self.latent.rope)
        return q, normal(self.kv_heads, keys, self.qk_dim), normal(self.kv_heads, keys, self.v_dim)

    def run(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One call of a candidate, causal and without padding."""
        if self.latent is not None:
            return self.latent.run(q, k, v, Seen(), self.scale, name)
        return CANDIDATES[name](self.module, q, k, v, Seen(), self.scale)

    def plain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What eager attention gives."""
        if self.latent is not None:
            k, v = self.latent.expand(k, v)
        return _plain(q, k, v, self.scale)

    def truth(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same in float32 throughout, from the same numbers."""
        q, k, v = q.float(), k.float(), v.float()
        if self.latent is not None:
            k, v = self.latent.expand_float(k, v)
        return _plain(q, k, v, self.scale)

    def error_of(self, name: str) -> str:
        """Why a candidate is wrong, or ''. FlashAttention's own rule: no further from float32 than twice what plain
        attention in this dtype is."""
        sizes = [(65, 65), (1, 131), (7, 40)]
        if self.device.type == "cuda":
            sizes.append((MANY_QUERIES + 88, MANY_QUERIES + 100))  # of the kernel that is chosen by time
        for queries, keys in sizes:
            inputs = self.inputs(queries, keys)
            truth = self.truth(*inputs)
            allowed = 2 * float((self.plain(*inputs).float() - truth).abs().max()) + 1e-5
            try:
                got = self.run(name, *inputs)
            except cannot_run() as refused:  # a package that was not made for this GPU, among others
                return f"does not run at {queries} x {keys}: {(str(refused).splitlines() or [''])[0]}"
            error = float((got.float() - truth).abs().max())
            if not error <= allowed:
                return f"wrong by {error:.3g} at {queries} x {keys}, allowed {allowed:.3g}"
        return ""

    def times(self, names: list[str], queries: int, keys: int) -> dict[str, float]:
        """Least seconds of a call, candidates in turn."""
        inputs = self.inputs(queries, keys)
        return self.time_runs({name: _bind(self.run, name, inputs) for name in names})

    def time_runs(self, runs: dict[str, Run]) -> dict[str, float]:
        """Least seconds of each, in turn, after one call to warm up. What is more than the least is the machine's."""
        samples: dict[str, list[float]] = {name: [] for name in runs}
        started = time.perf_counter()
        for done in range(_ROUNDS + 1):
            for name, run in runs.items():
                self._wait()
                begun = time.perf_counter()
                run()
                self._wait()
                if done:
                    samples[name].append(time.perf_counter() - begun)
            if done and time.perf_counter() - started > _BUDGET_S:
                break
        return {name: min(values) for name, values in samples.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _bind(run: Callable[..., torch.Tensor], name: str, inputs: tuple[torch.Tensor, ...]) -> Run:
    return lambda: run(name, *inputs)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scale + Seen().additive(q, k.shape[2])
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def choose(bench: Bench, names: list[str], prompt_tokens: int) -> Choice:
    """Drop candidates that are wrong, time the others, and take the fastest for prefill and for decode.

    Raises:
        PassError: every candidate is wrong.
    """
    choice = Choice("", "")
    for name in names:
        if reason := bench.error_of(name):
            choice.rejected[name] = reason
    fit = [name for name in names if name not in choice.rejected]
    if not fit:
        raise PassError("swap_flash_attention: no candidate is right: " + "; ".join(choice.rejected.values()))
    prompt = max(prompt_tokens, 2)
    choice.prefill = _fastest(bench, fit, [(prompt, prompt), (_LONG_PROMPT, _LONG_PROMPT)], "prefill", choice)
    choice.decode = _fastest(bench, fit, [(1, prompt), (1, _DEPTH)], "decode", choice)
    return choice


def _fastest(bench: Bench, names: list[str], sizes: list[tuple[int, int]], situation: str, choice: Choice) -> str:
    # by the geometric mean over the sizes: each counts alike, whatever it takes
    totals = dict.fromkeys(names, 0.0)
    for queries, keys in sizes:
        measured = bench.times(names, queries, keys)
        choice.times_us[f"{situation} {queries} x {keys}"] = {n: round(t * 1e6, 1) for n, t in measured.items()}
        for name in names:
            totals[name] += math.log(measured[name])
    return min(totals, key=lambda name: totals[name])


def absorbed_crossing(bench: Bench, latent: LatentAttention) -> int:
    """Number of queries up to which the absorbed form is the faster one, at least 1, from two measurements of each.

    Expanding has a fixed part, every key through kv_b_proj. The part that grows with the queries is larger absorbed, since
    latents are wider than heads.
    """
    few, many = _CROSSING_QUERIES
    times = {}
    for queries in (few, many):
        q, k, v = bench.inputs(queries, _CROSSING_KEYS)
        forms = {"absorbed": latent.run_absorbed, "expanded": latent.run_expanded}
        runs = {name: _bind_form(form, (q, k, v), bench.scale) for name, form in forms.items()}
        times[queries] = bench.time_runs(runs)
    gap_few = times[few]["expanded"] - times[few]["absorbed"]
    gap_many = times[many]["expanded"] - times[many]["absorbed"]
    closing = (gap_few - gap_many) / (many - few)
    if closing <= 0:
        return _NO_CROSSING
    return max(few, few + int(gap_few / closing))


def _bind_form(form: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], scale: float) -> Run:
    return lambda: form(*inputs, Seen(), scale)
