"""What can be done with models, optimized or not: read the receipt, take it back, write, read, compare them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from llmopt import side_by_side
from llmopt.errors import InputError
from llmopt.measure.comparison import Comparison
from llmopt.measure.report import Report
from llmopt.model_state import forget, is_optimized, state_of
from llmopt.models import resolve_model
from llmopt.passes import choose
from llmopt.passes.base import Event, Pass, PassContext

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


def save(
    model: Any, directory: str | Path, *, tokenizer: Any = None,
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq",
) -> Path:  # fmt: skip
    """Write an optimized (or plain) model as a standard checkpoint, with llmopt.json beside it.

    Args:
        model: optimized, loaded by :func:`load`, or a plain supported model.
        directory: made, or replaced if it holds a checkpoint; an existing one survives any failure.
        tokenizer: saved along; None takes the one beside the original weights, if any.
        checkpoint_format: how zero points of quantized weights are stored. "gptq" (v1: minus one) is what most tools
            read; it has no word for a zero point of 0, so that such groups of asymmetric weights are written mirrored,
            with a negative scale. "gptq_v2" stores every zero point as it is. :func:`load` reads both.

    Raises:
        InputError: an unknown checkpoint_format, or a model of no supported family.
        CheckpointError: the directory holds something else, or the disk is full; nothing has been changed.
    """
    from llmopt import checkpoint
    from llmopt.checkpoint.quant_config import check_format

    # before the originals are read back from disk
    check_format("checkpoint_format", checkpoint_format)
    if not is_optimized(model):
        return checkpoint.save(model, directory, tokenizer=tokenizer, checkpoint_format=checkpoint_format)
    state = state_of(model)
    originals = {}
    family = state.resolved.family
    for path, module in ((family.embedding, state.resolved.embedding), (family.head, state.resolved.head.module)):
        # a model loaded quantized has no originals; the writer then stores what the packed bytes stand for
        if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            originals[f"{path}.weight"] = state.originals.tensor(weight)
    applied = {p.name: {**p.options(), **done.settled} for p, done in state.kept}
    return checkpoint.save(
        model, directory, tokenizer=tokenizer, originals=originals, passes=applied, report=state.report,
        checkpoint_format=checkpoint_format,
    )  # fmt: skip


def load(
    directory: str | Path, *, passes: Sequence[str | Pass] | Literal["saved"] | None = "saved",
    device: str | torch.device = "cpu",
) -> Any:  # fmt: skip
    """Read a checkpoint: ours, GPTQ ones by AutoGPTQ or GPTQModel, or a plain one. Local files only.

    Args:
        directory: holds config.json and safetensors.
        passes: "saved" applies again, unmeasured, what llmopt.json records (int4 weights are in the file already);
            a sequence applies those; None applies nothing.
        device: where the weights go, tensor by tensor; packed ones are the same bytes on a GPU.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    from llmopt import checkpoint

    model = checkpoint.load(directory, device=device)
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
    ctx = PassContext(resolved, next(model.buffers()).device, lambda event: None, trials=False)
    for item in passes:
        verdict = item.check(ctx)
        if not verdict.applies:
            _LOG.warning("%s: not applied again: %s", item.name, verdict.reason)
            continue
        item.apply(ctx).patch.enable()


def compare(
    models: Mapping[str, Any],
    *,
    prompt: Any = None,
    on_event: Callable[[Event], None] | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure several models side by side, each as it is: plain, optimized, or loaded quantized. None is changed.

    All are timed in one interleaved run through ``generate``, with the machine's ceilings measured in the same rounds,
    and held against the first: ratios of times with intervals, and quality on held-out text where both read the same
    tokens.

    Args:
        models: name -> causal LM of a supported family, in eval mode; the first is the reference. All are in memory at
            once, and on one device.
        prompt: text, or token ids ``[T]`` or ``[1, T]`` that every vocabulary has. None: held-out text where the models
            share a tokenizer, else random ids.
        on_event: called with every :class:`~llmopt.passes.base.Event`.
        seed: of what is drawn (random ids).

    Raises:
        InputError: no model, one object under two names, a prompt that not all models can read, or models on different
            devices; also :class:`UnsupportedModelError` and :class:`ModelStateError`, as for :func:`optimize`.
    """
    return side_by_side.measure(models, prompt=prompt, on_event=on_event, seed=seed)
