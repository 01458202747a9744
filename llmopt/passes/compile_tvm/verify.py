"""The compiled step beside the model without it: the same tokens, logits of each step."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from llmopt.errors import PassError
from llmopt.passes.base import PassContext
from llmopt.runtime.engine import Engine
from llmopt.runtime.moe import MoeBlock
from llmopt.runtime.step import DecodeStep

_PROMPT, _TOKENS = 16, 16
# least cosine of the centred logits: on the average, and of any token. Quantized activations, and a router's choice, follow the
# last bits of what comes before, and carry them further.
_ALIKE, _ALIKE_ROUNDED = (0.99, 0.97), (0.9, 0.5)


@torch.no_grad()
def verify(ctx: PassContext, engine: Engine, tokens: int = _TOKENS) -> dict[str, Any]:
    """Decode greedily without the pass, then the same tokens by ``engine``.

    Args:
        ctx: of the pass, whose patch is off.
        engine: the compiled one.
        tokens: to decode.

    Returns:
        ``tokens``, how many of them ``agree``, ``mean_kl`` in nats a token, ``cosine`` of the logits and the ``least`` of any
        token: of those after the first, which a prefill gives.

    Raises:
        PassError: the outputs are others, or not finite.
    """
    model: Any = ctx.model
    generator = torch.Generator().manual_seed(ctx.seed)
    drawn = torch.randint(0, ctx.resolved.vocab_size, (_PROMPT,), generator=generator)
    prompt = (ctx.calibration[0] if ctx.calibration else drawn)[:_PROMPT][None].to(ctx.device)
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False, num_beams=1,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    chosen, expected = out.sequences[0, prompt.shape[1] :], torch.stack([x[0].float() for x in out.logits[1:]])
    cache = engine.new_cache(1, prompt.shape[1] + tokens + 2)
    engine.prefill(prompt, None, cache)
    got = []
    # greedy, as most steps are: a compiler then needs no second version for this
    step = DecodeStep(engine, cache, greedy=True)
    step.start(cache.length - cache.start)
    for token in chosen[:-1]:
        step.ids.fill_(token)
        step.run()
        step.complete()
        cache.length += 1
        got.append(step.logits[0].clone())
    rounds = any(isinstance(mlp, MoeBlock) or mlp.down.packed for _, mlp in engine.layers)
    return compared(expected, torch.stack(got), _ALIKE_ROUNDED if rounds else _ALIKE)


def compared(expected: torch.Tensor, got: torch.Tensor, alike: tuple[float, float]) -> dict[str, Any]:
    """Logits ``[T, V]`` beside each other; ``alike``: the least cosine on the average, and of any token.

    Raises:
        PassError: they are too far apart, or not finite.
    """
    if not bool(got.isfinite().all()):
        raise PassError("compile_tvm: the compiled step gives NaN or Inf")
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    agree = int((expected.argmax(-1) == got.argmax(-1)).sum())
    a, b = (x - x.mean(-1, keepdim=True) for x in (expected, got))
    cosines = functional.cosine_similarity(a, b, dim=-1)
    cosine, least = float(cosines.mean()), float(cosines.min())
    if not (cosine >= alike[0] and least >= alike[1]):
        figures = f"cosine {cosine:.3g} (least {least:.3g}), mean KL {kl:.3g} nats"
        raise PassError(f"compile_tvm: the compiled step gives other logits: {figures}")
    return {"tokens": len(got), "agree": agree, "mean_kl": kl, "cosine": cosine, "least": least}
