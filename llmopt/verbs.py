"""What can be done with an optimized model: read its receipt, take it back, write it, read it, compare it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from llmopt.errors import InputError
from llmopt.loop import optimize
from llmopt.measure.report import Report
from llmopt.model_state import forget, is_optimized, state_of
from llmopt.models import resolve_model
from llmopt.passes import choose
from llmopt.passes.base import Pass, PassContext

_LOG = logging.getLogger("llmopt")


def report(model: Any) -> Report:
    """The receipt of an optimized model."""
    return state_of(model).report


def restore(model: Any) -> Any:
    """Undo every pass. The model is bit for bit what it was before :func:`optimize`; returns it.

    Raises:
        InputError: the model is not optimized, or was loaded quantized (there is nothing to go back to).
    """
    state = state_of(model)
    state.originals.bring_back()
    state.stages.as_given()
    forget(model)
    return model


def save(model: Any, directory: str | Path, *, tokenizer: Any = None) -> Path:
    """Write an optimized (or plain) model as a standard checkpoint, with llmopt.json beside it.

    Args:
        model: optimized, loaded by :func:`load`, or a plain supported model.
        directory: made, or replaced if it holds a checkpoint; an existing one survives any failure.
        tokenizer: saved along; None takes the one beside the original weights, if any.
    """
    from llmopt import checkpoint

    if not is_optimized(model):
        return checkpoint.save(model, directory, tokenizer=tokenizer)
    state = state_of(model)
    originals = {}
    family = state.resolved.family
    for path, module in ((family.embedding, state.resolved.embedding), (family.head, state.resolved.head.module)):
        # a model loaded quantized has no originals; the writer then stores what the packed bytes stand for
        if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            originals[f"{path}.weight"] = state.originals.tensor(weight)
    applied = {p.name: p.options() for p, _ in state.kept}
    return checkpoint.save(
        model, directory, tokenizer=tokenizer, originals=originals, passes=applied, report=state.report
    )


def load(directory: str | Path, *, passes: Sequence[str | Pass] | Literal["saved"] | None = "saved") -> Any:
    """Read a checkpoint: ours, GPTQ ones by AutoGPTQ or GPTQModel, or a plain one. Local files only.

    Args:
        directory: holds config.json and safetensors.
        passes: "saved" applies again, unmeasured, what llmopt.json records (int4 weights are in the file already);
            a sequence applies those; None applies nothing.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    from llmopt import checkpoint

    model = checkpoint.load(directory)
    recorded = checkpoint.recorded_passes(directory) if passes == "saved" else passes
    again = [p for p in choose_recorded(recorded) if not p.needs_calibration]
    if again:
        _apply_unmeasured(model, again)
    return model


def choose_recorded(recorded: Any) -> list[Pass]:
    """Passes from names, objects, or the ``{name: options}`` of llmopt.json."""
    from llmopt.passes import PASSES

    if not isinstance(recorded, Mapping):
        return choose(recorded or ())
    unknown = [name for name in recorded if name not in PASSES]
    if unknown:
        raise InputError(f"llmopt.json: expected passes among {', '.join(PASSES)}, got {unknown[0]!r}")
    return choose([PASSES[n](**{k: tuple(v) if isinstance(v, list) else v for k, v in o.items()})
                   for n, o in recorded.items()])  # fmt: skip


def _apply_unmeasured(model: Any, passes: list[Pass]) -> None:
    resolved = resolve_model(model)
    ctx = PassContext(resolved, next(model.buffers()).device, lambda event: None)
    for item in passes:
        verdict = item.check(ctx)
        if not verdict.applies:
            _LOG.warning("%s: not applied again: %s", item.name, verdict.reason)
            continue
        item.apply(ctx).patch.enable()


def compare(models: Mapping[str, Any], **settings: Any) -> list[Report]:
    """Receipts of several models, for a table side by side (:func:`llmopt.measure.views.print_compare`).

    Args:
        models: name -> model. Optimized ones give the receipt they have; others are optimized first, with ``settings``
            as for :func:`optimize`.
    """
    if not models:
        raise InputError.argument("models", expected="at least one model", got=models)
    reports = []
    for name, model in models.items():
        if not is_optimized(model):
            optimize(model, **settings)
        receipt = report(model)
        receipt.model["name"] = name
        reports.append(receipt)
    return reports
