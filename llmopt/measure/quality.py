"""What a stage does to the output: its logits on held-out text against the eager baseline's, or another model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmopt.measure.report import Quality
from llmopt.models.base import ResolvedModel

# bytes of baseline log-probabilities kept in memory; decides how many tokens are compared
_LOGIT_BYTES = 320 << 20
_BATCH_TOKENS = 1024


@dataclass(slots=True)
class Reference:
    """The outputs of the eager baseline, or of another model with the same vocabulary, on the quality text."""

    ids: torch.Tensor  # [N, T] int64
    log_probs: torch.Tensor  # [N, T, V] bfloat16 or float32
    layers: list[torch.Tensor]  # per decoder layer, [T, H] outputs on the first row
    nll: torch.Tensor  # scalar, mean negative log-likelihood
    dtype: torch.dtype  # of the model


def choose_rows(rows: list[torch.Tensor], vocab: int) -> torch.Tensor:
    """As many of the rows as the logit budget allows, at least one, ``[N, T]``; rows are cut if even one is too long."""
    most = max(64, _LOGIT_BYTES // (vocab * 4))
    length = min(len(rows[0]), most)
    return torch.stack([r[:length] for r in rows[: max(1, most // length)]])


@torch.no_grad()
def reference(resolved: ResolvedModel, ids: torch.Tensor) -> Reference:
    """Record the baseline. The model must be in its baseline stage."""
    log_probs = torch.cat([b.log_softmax(-1) for b in _logits(resolved.model, ids)])
    return Reference(ids, log_probs, _layer_outputs(resolved, ids), _nll(log_probs, ids), resolved.dtype)


@torch.no_grad()
def compare(resolved: ResolvedModel, ref: Reference) -> Quality:
    """Measure the model, as it is now, against the baseline.

    Of a model with other layers than the reference (in number or width) no layer is named as the first to differ.
    """
    kl_sum = kl_max = logit_diff = 0.0
    agree, start, nll = 0, 0, 0.0
    for logits in _logits(resolved.model, ref.ids):
        rows = slice(start, start + logits.shape[0])
        start = rows.stop
        base, now = ref.log_probs[rows], logits.log_softmax(-1)
        # rounding may leave a divergence just below zero
        kl = (base.exp() * (base - now)).sum(-1).clamp(min=0)
        kl_sum += float(kl.double().sum())
        kl_max = _worst(kl_max, float(kl.max()))
        agree += int((base.argmax(-1) == now.argmax(-1)).sum())
        logit_diff = _worst(logit_diff, float((base - now).abs().max()))
        nll += float(_nll(now, ref.ids[rows])) * logits.shape[0]
    tokens = ref.ids.numel()
    perplexity = _exp(nll / ref.ids.shape[0])
    divergent, broken = _first_divergence(_layer_outputs(resolved, ref.ids), ref, resolved)
    return Quality(
        tokens=tokens, mean_kl=kl_sum / tokens, max_kl=kl_max, top1_agreement=agree / tokens,
        perplexity=perplexity, perplexity_ratio=perplexity / _exp(float(ref.nll)), max_abs_logit_diff=logit_diff,
        first_divergent_layer=divergent, non_finite=broken,
    )  # fmt: skip


def _logits(model: Any, ids: torch.Tensor) -> Any:
    rows = max(1, _BATCH_TOKENS // ids.shape[1])
    for start in range(0, ids.shape[0], rows):
        yield model(input_ids=ids[start : start + rows], use_cache=False).logits.float()


def _nll(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).mean()


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _worst(a: float, b: float) -> float:
    """The larger, or NaN if either is: ``max`` would drop it."""
    return math.nan if math.isnan(a + b) else max(a, b)


def _layer_outputs(resolved: ResolvedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        outputs.append((out[0] if isinstance(out, tuple) else out)[0].float())

    handles = [layer.module.register_forward_hook(hook) for layer in resolved.layers]
    try:
        resolved.model(input_ids=ids[:1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _first_divergence(now: list[torch.Tensor], ref: Reference, resolved: ResolvedModel) -> tuple[str | None, list[str]]:
    """First layer off by more than rounding of the models' dtypes explains, and layers that hold NaN or Inf."""
    rounding = 8 * max(torch.finfo(resolved.dtype).eps, torch.finfo(ref.dtype).eps)
    divergent = None
    broken = [layer.name for layer, x in zip(resolved.layers, now, strict=True) if not torch.isfinite(x).all()]
    if [x.shape for x in now] != [x.shape for x in ref.layers]:
        return None, broken
    for layer, a, b in zip(resolved.layers, now, ref.layers, strict=True):
        # "not within", so that NaN counts as off
        if not float((a - b).norm()) <= rounding * float(b.norm()):
            divergent = layer.name
            break
    return divergent, broken
