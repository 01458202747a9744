"""Right answers of whole models: families through the engine, GPTQ's loops, decoding ahead of the host, passes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.run import Run, WrongAnswerError

FAMILY_COSINE = 0.995  # int4 linears at 16-bit activations beside the same weights dequantized
PASS_COSINE = 0.8  # int4 weights of a small model with random ones, beside the weights themselves
# what Triton's interpreter can stand in for: compiled steps and pooled ones are recorded
NOT_COMPILED = ("swap_flash_attention", "fuse_kernels")


def check_families(run: Run) -> dict[str, float]:
    """Every family's small model, int4: the least cosine of logits beside the same weights dequantized, over prefill, decode
    by launches, and decode with pool_memory (a CUDA graph)."""
    import llmopt
    from llmopt.models import FAMILIES
    from llmopt.models.shapes import decide_routers_, tiny_model

    found = {}
    for family in ["qwen3"] if run.interpret else [f.model_type for f in FAMILIES]:
        dtype = torch.float32 if run.interpret else torch.bfloat16
        model = decide_routers_(tiny_model(family, dtype=dtype))
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


def check_gptq(run: Run) -> int:
    """The scale search and the column loop of GPTQ beside their reference: how many cases were right."""
    from llmopt.ops.gptq_round import reference, round_span, search_scales

    draw = torch.Generator().manual_seed(0)
    cases = [(2, 17, 33)] if run.interpret else [(1, 1, 1), (2, 17, 33), (3, 40, 128), (1, 4096, 128)]
    for batch, rows, columns in cases:
        w = torch.randn(batch, rows, columns, generator=draw)
        x = torch.randn(batch, 3 * columns, columns, generator=draw)
        inverse = torch.linalg.inv(x.transpose(1, 2) @ x / (3 * columns) + 0.05 * torch.eye(columns))
        u, weight = torch.linalg.cholesky(inverse, upper=True).contiguous(), torch.rand(batch, columns, generator=draw)
        for symmetric in (True, False):
            what = f"gptq_round, {rows} x {columns}, {'symmetric' if symmetric else 'asymmetric'}"
            scale, zero = reference.search_scales(w, weight, bits=4, symmetric=symmetric)
            codes, _ = reference.round_span(w, u, scale, zero, bits=4)
            with run.kernels():
                found = search_scales(w.to(run.device), weight.to(run.device), bits=4, symmetric=symmetric)
                got, _ = round_span(*(t.to(run.device) for t in (w, u, scale, zero)), bits=4)
            # a weight on the edge between two codes, or two scales as good as each other, may fall either way
            for name, same in (("scales", found[0].cpu() == scale), ("codes", got.cpu() == codes)):
                if not float(same.float().mean()) > 0.97:
                    raise WrongAnswerError(
                        f"{what}: {float(same.float().mean()):.1%} of the {name} are the reference's"
                    )
    return 2 * len(cases)


def check_ahead(run: Run) -> int:
    """Tokens decoded ahead of the host beside those one by one, largest and drawn, wherever a call ends: how many calls were
    right."""
    from unittest import mock

    from llmopt.models import resolve_model
    from llmopt.models.shapes import tiny_model
    from llmopt.passes import FuseKernels, PoolMemory
    from llmopt.passes.base import PassContext

    right = 0
    most = 3 if run.interpret else 24
    for pooled in (False,) if run.interpret else (False, True):
        dtype = torch.float32 if run.interpret else torch.bfloat16
        resolved = resolve_model(tiny_model("qwen3", dtype=dtype).to(run.device))
        context = PassContext(resolved, resolved.device, lambda event: None, timed=False)
        with run.kernels():
            for item in (FuseKernels(), PoolMemory()) if pooled else (FuseKernels(),):
                item.apply(context).patch.enable()
            for sequences in (1,) if run.interpret else (1, 3):
                prompt = torch.randint(5, 500, (sequences, 6), generator=torch.Generator().manual_seed(0)).to(
                    run.device
                )
                options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
                free = resolved.model.generate(prompt, max_new_tokens=most, eos_token_id=None, **options)
                end = int(free[0, 6 + most // 2])
                for more in (
                    {"eos_token_id": None},
                    {"eos_token_id": end},
                    {"eos_token_id": end, "min_new_tokens": most - 1},
                    {"eos_token_id": None, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
                    {"eos_token_id": end, "do_sample": True, "temperature": 1.2},
                ):
                    tokens = []
                    for devices in (set[str](), {run.device.type}):
                        torch.manual_seed(1)
                        with mock.patch("llmopt.runtime.decoding.AHEAD", devices):
                            tokens.append(resolved.model.generate(prompt, max_new_tokens=most, **{**options, **more}))
                    if not torch.equal(*tokens):
                        raise WrongAnswerError(f"decoded ahead, {sequences} sequences, {more}: {tokens}")
                    right += 1
    return right


def check_passes(run: Run) -> dict[str, str]:
    """Every pass on every family's small model: the least cosine of its logits, of the prompt and of tokens decoded one by one,
    with those before; or why it does not apply. Undone, the model is the one before, bit by bit."""
    from llmopt.models import FAMILIES, resolve_model
    from llmopt.models.shapes import decide_routers_, tiny_model
    from llmopt.passes import PASSES
    from llmopt.passes.base import PassContext

    found = {}
    rows = torch.randint(5, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    for family in ["ernie4_5"] if run.interpret else [f.model_type for f in FAMILIES]:
        dtype = torch.float32 if run.interpret else torch.bfloat16
        resolved = resolve_model(decide_routers_(tiny_model(family, dtype=dtype)).to(run.device))
        ids = rows[:1, : 6 if run.interpret else 24].to(run.device)
        before = forced_logits(resolved.model, ids)
        for name in PASSES if not run.interpret else NOT_COMPILED:
            # the interpreter's times tell nothing, and take minutes
            forced = run.interpret and name == "swap_flash_attention"
            item = PASSES[name](force="llmopt") if forced else PASSES[name]()
            context = PassContext(
                resolved, resolved.device, lambda event: None, calibration=list(rows[1:].to(run.device)), timed=False
            )
            verdict = item.check(context)
            if not verdict.applies:
                found[f"{family}, {name}"] = f"does not apply: {verdict.reason}"
                continue
            with run.kernels():
                patch = item.apply(context).patch
                patch.enable()
                got = forced_logits(resolved.model, ids)
                patch.disable()
            cosine = torch.nn.functional.cosine_similarity(got, before, dim=-1)
            least = PASS_COSINE if name == "quantize_gptq" else FAMILY_COSINE
            if not bool((cosine > least).all()):
                raise WrongAnswerError(f"{family}, {name}: cosines {cosine.tolist()}, expected {least}")
            if not torch.equal(forced_logits(resolved.model, ids), before):
                raise WrongAnswerError(f"{family}, {name}: undone, the logits are others than before")
            found[f"{family}, {name}"] = f"{float(cosine.min()):.4f}"
    return found


def forced_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ``ids`` [1, T] in one go, and of each token after the first two by ``generate``: ``[2 T - 2, V]`` float32."""
    whole = model(ids).logits[0]

    def forced(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = ids[0, _ids.shape[1]]
        return torch.full_like(scores, float("-inf")).index_fill_(1, token[None], 0.0)

    out = model.generate(
        ids[:, :2], attention_mask=torch.ones_like(ids[:, :2]), max_new_tokens=ids.shape[1] - 2, do_sample=False,
        logits_processor=[forced], output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return torch.cat([whole, *out.logits]).float()


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
