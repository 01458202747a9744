"""Times: kernels beside the ceilings of the same run, and decoding on published shapes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.run import Run

# rows and columns of Qwen3-8B: merged q/k/v, output, merged gate and up, down
LINEARS = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
TOKENS = (1, 4, 8, 16, 64, 256, 512, 4096)
# as Qwen3's generation config has it
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
SHAPES = ("qwen3-8b", "ernie-4.5-21b-a3b", "deepseek-v2-lite")


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
    from llmopt.arena import WeightArena
    from llmopt.ops.int4_linear import int4_linear
    from llmopt.passes.quantize_gptq.direct import RandomCodes

    peak, rows = run.found["steps"]["ceilings"], []
    for n, k in LINEARS[: 1 if run.quick else None]:
        # of zeros a GPU computes products in less time
        one = RandomCodes(0.02, 0, WeightArena(0)).packed("linear", n, k, 128, bits=4).to(run.device)
        copies = [one.clone() for _ in range(max(2, -(-(256 << 20) // one.nbytes)))]
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


def time_candidates(run: Run) -> list[dict[str, Any]]:
    """What swap_flash_attention chooses from, at the heads of Qwen3-8B and of DeepSeek-V2-Lite: right or not, and times."""
    from types import SimpleNamespace

    from llmopt.passes.swap_flash_attention.candidates import Bench, available

    rows = []
    usable = [name for name, reason in available(run.device, torch.bfloat16).items() if not reason]
    for what, heads, groups, dims in (
        ("GQA, 128", 32, 4, (128, 128)),
        ("MLA expanded, 192 and 128", 16, 1, (192, 128)),
    ):
        module = SimpleNamespace(
            scaling=dims[0] ** -0.5,
            num_key_value_groups=groups,
            qk_head_dim=dims[0],
            v_head_dim=dims[1],
            training=False,
        )
        config = SimpleNamespace(num_attention_heads=heads)
        bench = Bench(module, None, config, torch.bfloat16, run.device)
        wrong = {name: bench.error_of(name) for name in usable}
        right = [name for name in usable if not wrong[name]]
        rows += [{"what": what, "candidate": name, "why not": reason} for name, reason in wrong.items() if reason]
        for queries, keys in ((2048, 2048), (1, 8192)) if run.quick else ((2048, 2048), (16384, 16384), (1, 8192)):
            for name, seconds in bench.times(right, queries, keys).items():
                # causal: half of the products
                flops = 2 * heads * queries * keys * sum(dims) / (2 if queries > 1 else 1)
                rows.append({"what": f"{what}: {queries} x {keys}", "candidate": name, "ms": seconds * 1e3,
                             "tflops": flops / seconds / 1e12})  # fmt: skip
    return rows


def time_shape(shape: str) -> Callable[[Run], dict[str, Any]]:
    """Milliseconds a token of a shape in int4 with both passes, for 1 and 16 sequences, largest and drawn, and of prefilling
    4096; those of eager bfloat16 for one sequence."""

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
            found[f"sampled_tpot_ms_{batch}"] = _tpot(model, prompt, **SAMPLED)
        long = torch.randint(5, 1000, (1, 4096), device=run.device)
        found["prefill_4096_ms"] = _first(model, long)
        del model, resolved, context
        gc.collect()
        torch.cuda.empty_cache()
        found["eager_tpot_ms_1"] = eager_tpot(shape, run.device)
        found["x_eager_1"] = found["eager_tpot_ms_1"] / found["tpot_ms_1"]
        return found

    return work


def eager_tpot(shape: str, device: torch.device) -> float:
    """Milliseconds a token of a shape as transformers runs it, eager, in bfloat16 with random weights; one sequence."""
    model = eager_model(shape, device)
    return _tpot(model, torch.randint(5, 1000, (1, 128), device=device), 17)


def eager_model(shape: str, device: torch.device) -> Any:
    """A shape in bfloat16, its weights drawn on the device."""
    from llmopt.checkpoint.skeleton import fill_computed_buffers
    from llmopt.models import resolve_model, shapes

    model = shapes.meta_model(shape).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        for buffer in model.buffers():
            buffer.zero_()  # a router's corrections; rotary frequencies are computed below
    fill_computed_buffers(resolve_model(model), device)
    model.set_attn_implementation("eager")
    return model


def _first(model: Any, prompt: torch.Tensor, tokens: int = 1, **options: Any) -> float:
    asked = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": tokens, "min_new_tokens": tokens, **options}
    if asked["do_sample"]:
        # the end token is left alone: what forbids it has to run before the filters
        asked |= {"min_new_tokens": None, "eos_token_id": None}
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:])


def _tpot(model: Any, prompt: torch.Tensor, tokens: int = 129, **options: Any) -> float:
    return (_first(model, prompt, tokens, **options) - _first(model, prompt, 1, **options)) / (tokens - 1)
