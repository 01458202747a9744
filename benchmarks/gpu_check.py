"""Everything llmopt does on an NVIDIA GPU, checked and then timed, in one command of some minutes.

    python -m benchmarks.gpu_check [--quick] [--seconds 540] [--json FILE] [--markdown FILE]
    python -m benchmarks.gpu_check --interpret          # without a GPU: small cases by Triton's interpreter, nothing timed

In this order, and not a step further than the first wrong answer: every op against its reference, every family's small model
through the engine (launched, and as a CUDA graph) against the model itself, kernels against the ceilings measured beside them,
and decoding on published shapes with random weights. Exits with 1 where an answer is wrong, a step fails, or answers could not
be checked. Steps that no time is left for are named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

FAMILY_COSINE = 0.995  # int4 linears at 16-bit activations beside the same weights dequantized
# relative to the largest value: what is rounded to these between two products of a kernel (attention's weights, activations)
ROUNDED = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 0.0}
# tokens are rounded to float16 in place of 8 bits
PRODUCTS = {"int4_linear", "int8_linear", "int4_experts", "fused_linear", "moe", "latent_cache", "latent_output"}
# without a kernel of their own on a GPU: the screened head pays where bytes of the head are most of a token
CPU_ONLY = {"screened_head"}
# rows and columns of Qwen3-8B: merged q/k/v, output, merged gate and up, down
LINEARS = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
TOKENS = (1, 4, 8, 16, 64, 256, 512, 4096)
SHAPES = ("qwen3-8b", "ernie-4.5-21b-a3b", "deepseek-v2-lite")


class WrongAnswerError(AssertionError):
    """A kernel or a model gave something else than its reference."""


class Run:
    """The device, the time that is left, and what has been found."""

    def __init__(self, *, interpret: bool, quick: bool, seconds: float) -> None:
        self.interpret, self.quick = interpret, quick
        self.device = torch.device("cpu" if interpret else "cuda")
        self.end = time.perf_counter() + seconds
        self.found: dict[str, Any] = {"steps": {}, "left_out": []}

    def left(self) -> float:
        return self.end - time.perf_counter()

    def kernels(self) -> AbstractContextManager[None]:
        """Ops by Triton, wherever the tensors lie."""
        from llmopt.ops.device import interpreting

        return interpreting() if self.interpret else nullcontext()

    def step(self, name: str, least_s: float, work: Callable[[Run], Any]) -> None:
        """Do it if ``least_s`` seconds are left; a wrong answer ends the run."""
        if self.left() < least_s:
            self.found["left_out"].append(name)
            return
        began = time.perf_counter()
        try:
            with torch.no_grad():
                self.found["steps"][name] = work(self)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
            self.found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


# ---- right answers


def check_ops(run: Run) -> dict[str, int]:
    """Every case of every op that has a kernel: how many were right."""
    from llmopt.ops import SPECS
    from llmopt.ops.int4_linear.reference import sixteen_bit_tokens

    right: dict[str, int] = {}
    for name, spec in SPECS.items():
        if name in CPU_ONLY:
            continue
        for case in spec.cases:
            if case.real and (run.interpret or run.quick):
                continue
            dtypes = case.params.get("dtypes", spec.tolerance)
            for dtype in dtypes if not run.interpret else list(dtypes)[:1]:
                inputs = spec.make_inputs(type(case)(case.name, {**case.params, "dtype": dtype}, case.real), 1)
                if run.interpret and spec.flops(**inputs) > 100_000:
                    continue
                with sixteen_bit_tokens():
                    expected = spec.reference(**inputs)
                with run.kernels():
                    got = spec.run(**tree_map(lambda x: _to(x, run.device), inputs)).to(expected.device)
                _compare(f"{name}, {case.name}, {dtype}", got, expected, *tolerance(spec, dtype, expected))
                right[name] = right.get(name, 0) + 1
    return right


def _to(x: Any, device: torch.device) -> Any:
    from llmopt.ops.fused_linear import Weight

    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, Weight):
        bias = None if x.bias is None else x.bias.to(device)
        return Weight(x.data.to(device), x.rows, x.cols, x.bits, x.group_size, x.asymmetric, bias)
    return x


def tolerance(spec: Any, dtype: torch.dtype, expected: torch.Tensor) -> tuple[float, float]:
    """``(rtol, atol)`` of a Triton kernel beside its op's reference."""
    rtol, atol = spec.tolerance[dtype]
    size = float(expected.float().abs().max()) if expected.numel() else 0.0
    product = spec.name in PRODUCTS
    return max(rtol, 4e-3 if product else 0.0), max(atol, ROUNDED[dtype] * size, 2e-3 * size if product else 0.0)


def _compare(what: str, got: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    try:
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise WrongAnswerError(f"{what}: {error}") from None


def check_families(run: Run) -> dict[str, float]:
    """Every family's small model, int4: the least cosine of logits beside the same weights dequantized, over prefill, decode
    by launches, and decode with pool_memory (a CUDA graph)."""
    import llmopt
    from llmopt.models import FAMILIES
    from llmopt.models.shapes import tiny_model

    found = {}
    for family in ["qwen3"] if run.interpret else [f.model_type for f in FAMILIES]:
        dtype = torch.float32 if run.interpret else torch.bfloat16
        model = tiny_model(family, dtype=dtype)
        rows = torch.randint(5, 500, (2, 32), generator=torch.Generator().manual_seed(0))
        llmopt.optimize(model, ["quantize_gptq"], calibration=rows, measure=False)
        model.to(run.device)
        ids = rows[:1, : 6 if run.interpret else 12].to(run.device)
        expected = dequantized_logits(model, ids)
        least = 1.0
        with run.kernels():
            for pooled in (False, True):
                got = decoded_logits(model, ids, prompt=4, pooled=pooled)
                cosine = torch.nn.functional.cosine_similarity(got.float(), expected[:, 3:].float(), dim=-1)
                # NaN is no larger than anything
                if not bool((cosine > FAMILY_COSINE).all()):
                    how = "pooled" if pooled else "launched"
                    raise WrongAnswerError(f"{family}, {how}: cosines {cosine.tolist()}, expected {FAMILY_COSINE}")
                least = min(least, float(cosine.min()))
        found[family] = least
    return found


def dequantized_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """By torch alone, each weight dequantized: ``[1, T, V]``."""
    from unittest import mock

    with mock.patch("llmopt.packed.uses_kernels", return_value=False):
        logits: torch.Tensor = model(ids).logits
        return logits


def decoded_logits(model: Any, ids: torch.Tensor, *, prompt: int, pooled: bool) -> torch.Tensor:
    """By the engine: ``prompt`` tokens at once, then one by one; ``[1, T - prompt + 1, V]``."""
    from llmopt.models import resolve_model
    from llmopt.runtime.engine import Engine
    from llmopt.runtime.step import DecodeStep

    engine = Engine(resolve_model(model), pooled=pooled)
    cache = engine.new_cache(1, ids.shape[1] + 2)
    logits = [engine.prefill(ids[:, :prompt], None, cache)]
    step = DecodeStep(engine, cache)
    step.start(cache.length - cache.start)
    for i in range(prompt, ids.shape[1]):
        step.ids.copy_(ids[:, i])
        step.run()
        cache.length += 1
        logits.append(step.logits.clone())
    return torch.stack(logits, 1)


# ---- times


def ms_of(calls: list[Callable[[], Any]]) -> float:
    """Milliseconds of one call, of all in turn."""
    from benchmarks.triton_gemv import microseconds

    return microseconds(calls) / 1e3


def ceilings(run: Run) -> dict[str, float]:
    """Bytes a second read from memory, and float operations a second of a large bfloat16 product."""
    from benchmarks.triton_gemv import read_tb_per_s

    a = torch.randn(8192, 8192, device=run.device, dtype=torch.bfloat16)
    flops = 2 * 8192**3 / (ms_of([lambda: a @ a]) * 1e-3)
    return {"read_bytes_s": read_tb_per_s() * 1e12, "bf16_flops_s": flops}


def time_linears(run: Run) -> list[dict[str, Any]]:
    """int4 linears of Qwen3-8B's sizes over numbers of tokens, on weights that together are larger than the L2."""
    from llmopt.ops.int4_linear import int4_linear, layout

    peak, rows = run.found["steps"]["ceilings"], []
    for n, k in LINEARS[: 1 if run.quick else None]:
        shape = layout.packed_shape(n, k, 128, bits=4, asymmetric=False)
        one = torch.zeros(shape, dtype=torch.uint8, device=run.device)
        copies = [torch.zeros_like(one) for _ in range(max(2, -(-(256 << 20) // one.nbytes)))]
        for tokens in (1, 16, 256) if run.quick else TOKENS:
            x = torch.randn(tokens, k, device=run.device, dtype=torch.bfloat16)
            some = copies if tokens <= 256 else copies[:2]
            options = {"out_features": n, "group_size": 128, "asymmetric": False}
            ms = ms_of([partial(int4_linear, x, w, **options) for w in some])
            rows.append({
                "rows": n, "cols": k, "tokens": tokens, "ms": ms,
                "of_bandwidth": one.nbytes / (ms * 1e-3) / peak["read_bytes_s"],
                "of_bf16_peak": 2 * tokens * n * k / (ms * 1e-3) / peak["bf16_flops_s"],
            })  # fmt: skip
    return rows


def time_attention(run: Run) -> list[dict[str, Any]]:
    """Causal prefill of 32 heads of 128 (8 key heads), and decode over a long cache; torch's SDPA beside prefill."""
    from llmopt.ops.attention import attention
    from llmopt.ops.cache_attention import cache_attention

    peak, rows = run.found["steps"]["ceilings"], []
    for length in (2048,) if run.quick else (2048, 16384):
        q = torch.randn(1, 32, length, 128, device=run.device, dtype=torch.bfloat16)
        k, v = (torch.randn(1, 8, length, 128, device=run.device, dtype=torch.bfloat16) for _ in "kv")
        flops = 2 * 32 * length * length * 128
        ours = ms_of([partial(attention, q, k, v, scale=128**-0.5)])
        sdpa = torch.nn.functional.scaled_dot_product_attention
        torchs = ms_of([partial(sdpa, q, k, v, is_causal=True, enable_gqa=True)])
        rows.append({
            "what": f"causal prefill of {length}", "ms": ours, "sdpa_ms": torchs, "tflops": flops / ours / 1e9,
            "of_bf16_peak": flops / (ours * 1e-3) / peak["bf16_flops_s"],
        })  # fmt: skip
    for depth in (8192,) if run.quick else (8192, 32768):
        q = torch.randn(1, 32, 128, device=run.device, dtype=torch.bfloat16)
        caches = [
            [torch.randn(1, 8, depth, 128, device=run.device, dtype=torch.bfloat16) for _ in "kv"]
            for _ in range(max(2, (256 << 20) // (depth * 8 * 128 * 4)))
        ]
        zero, slot = (torch.full((1,), i, dtype=torch.int32, device=run.device) for i in (0, depth - 1))
        out = torch.empty(1, 32 * 128, device=run.device, dtype=torch.bfloat16)
        place = {"seq": zero, "slot": slot, "start": zero, "scale": 128**-0.5}
        ms = ms_of([partial(cache_attention, q, k, v, out, **place) for k, v in caches])
        moved = depth * 8 * 128 * 2 * 2
        rows.append({
            "what": f"decode at {depth}", "ms": ms, "of_bandwidth": moved / (ms * 1e-3) / peak["read_bytes_s"],
        })  # fmt: skip
    return rows


def time_shape(shape: str) -> Callable[[Run], dict[str, Any]]:
    """Milliseconds a token of a shape in int4 with both passes, for 1 and 16 sequences, and of prefilling 4096."""

    def work(run: Run) -> dict[str, Any]:
        from llmopt.models import resolve_model
        from llmopt.passes import PASSES
        from llmopt.passes.base import PassContext
        from llmopt.passes.quantize_gptq.direct import build_quantized

        model = build_quantized(shape)[0].to(run.device)
        resolved = resolve_model(model)
        for name in ("fuse_kernels", "pool_memory"):
            context = PassContext(resolved, resolved.device, lambda event: None, timed=False)
            PASSES[name]().apply(context).patch.enable()
        found: dict[str, Any] = {}
        for batch in (1, 16):
            prompt = torch.randint(5, 1000, (batch, 128), device=run.device)
            found[f"tpot_ms_{batch}"] = _tpot(model, prompt)
        long = torch.randint(5, 1000, (1, 4096), device=run.device)
        found["prefill_4096_ms"] = _first(model, long)
        return found

    return work


def _first(model: Any, prompt: torch.Tensor, tokens: int = 1) -> float:
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                       do_sample=False, pad_token_id=0)  # fmt: skip
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:])


def _tpot(model: Any, prompt: torch.Tensor) -> float:
    return (_first(model, prompt, 129) - _first(model, prompt, 1)) / 128


# ---- the table


def table(found: dict[str, Any]) -> Iterator[str]:
    """Markdown of what was found."""
    steps = found["steps"]
    if "ops" in steps:
        yield f"Right: {sum(steps['ops'].values())} cases of {len(steps['ops'])} ops."
    if "families" in steps:
        cosines = ", ".join(f"{name} {value:.4f}" for name, value in steps["families"].items())
        yield f"Least cosine of int4 logits, prefilled and decoded: {cosines}."
    if "ceilings" in steps:
        peak = steps["ceilings"]
        yield f"Ceilings: {peak['read_bytes_s'] / 1e12:.2f} TB/s read, {peak['bf16_flops_s'] / 1e12:.0f} TFLOP/s in bfloat16."
    for name in ("linears", "attention"):
        if rows := steps.get(name):
            heads = list(dict.fromkeys(key for row in rows for key in row))
            yield "\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|"
            yield from ("| " + " | ".join(_cell(row.get(key)) for key in heads) + " |" for row in rows)
    for shape in SHAPES:
        if shape in steps:
            yield f"\n{shape}, int4: " + ", ".join(f"{key} {value:.3f}" for key, value in steps[shape].items())
    if found["left_out"]:
        yield "\nNo time was left for: " + ", ".join(found["left_out"])
    yield from (f"\n**Failed, {name}: {error}**" for name, error in found.get("failed", {}).items())
    if "wrong" in found:
        yield f"\n**Wrong: {found['wrong']}**"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def check(run: Run) -> bool:
    """All steps; False where an answer is wrong, a step fails, or answers could not be checked."""
    try:
        run.step("ops", 0, check_ops)
        run.step("families", 20, check_families)
    except WrongAnswerError as error:
        run.found["wrong"] = str(error)
        return False
    if run.interpret or "families" not in run.found["steps"]:
        return {"ops", "families"} <= set(run.found["steps"])
    run.step("ceilings", 20, ceilings)
    if "ceilings" in run.found["steps"]:
        run.step("linears", 40, time_linears)
        run.step("attention", 30, time_attention)
    for shape in () if run.quick else SHAPES:
        run.step(shape, 90, time_shape(shape))
    return "failed" not in run.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes: small cases, one linear, no whole model")
    parser.add_argument("--seconds", type=float, help="time to use (540; quick: 110)")
    parser.add_argument("--interpret", action="store_true", help="without a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported
    elif not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device; --interpret runs the small cases without one")
    run = Run(interpret=args.interpret, quick=args.quick, seconds=args.seconds or (110 if args.quick else 540))
    right = check(run)
    from llmopt.measure import environment

    command = "python -m benchmarks.gpu_check" + " --quick" * args.quick + " --interpret" * args.interpret
    name = "Triton's interpreter" if args.interpret else torch.cuda.get_device_name()
    text = "\n".join([f"# GPU check, {name}\n\n    {command}\n", *table(run.found)])
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        recorded = {"environment": environment.capture(), "command": command, "device": name, **run.found}
        args.json.write_text(json.dumps(recorded, indent=1) + "\n")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
