"""What can be done with models, optimized or not: read the receipt, take it back, write, read, compare them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from llmopt import side_by_side
from llmopt.errors import CheckpointError, InputError
from llmopt.measure.comparison import Comparison
from llmopt.measure.report import Report
from llmopt.model_state import Inherited, active_passes, forget, inherit, inherited_by, is_optimized, state_of
from llmopt.models import resolve_model
from llmopt.passes import PASSES, choose
from llmopt.passes.base import Event, Pass, PassContext

_LOG = logging.getLogger("llmopt")


def report(model: Any) -> Report:
    """The receipt of a model.

    Args:
        model: optimized by :func:`optimize`, loaded from a checkpoint that :func:`save` wrote, or a copy of one of these.

    Returns:
        The receipt: of a loaded model, the one saved with it, whose figures are of the environment named in it; of a copy,
        that of the model that was copied.

    Raises:
        InputError: the model is none of these, or was saved without a receipt.
    """
    inherited = inherited_by(model)
    return state_of(model).report if inherited is None or is_optimized(model) else inherited.report()


def restore(model: Any) -> Any:
    """Undo every pass. The model is bit for bit what it was before :func:`optimize`; returns it.

    Raises:
        InputError: the model is not optimized. One that was loaded with its passes is not: ``load(directory,
            passes=None)`` gives it without them. Nor is a copy of an optimized model.
        CheckpointError: the file that keeps the original weights is gone or damaged; nothing has been changed.
    """
    inherited = inherited_by(model)
    if inherited is not None and not is_optimized(model):
        raise InputError(f"model: not optimized, there is nothing to go back to: {inherited.without()}")
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
        model: optimized, loaded by :func:`load`, a copy of these, or a plain supported model.
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
    passes = active_passes(model)
    if not is_optimized(model):
        inherited = inherited_by(model)
        receipt = inherited.report() if inherited is not None and inherited.recorded is not None else None
        return checkpoint.save(
            model, directory, tokenizer=tokenizer, passes=passes, report=receipt, checkpoint_format=checkpoint_format
        )
    state, originals = state_of(model), {}
    family = state.resolved.family
    for path, module in ((family.embedding, state.resolved.embedding), (family.head, state.resolved.head.module)):
        # a model loaded quantized has no originals; the writer then stores what the packed bytes stand for
        if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            originals[f"{path}.weight"] = state.originals.tensor(weight)
    return checkpoint.save(
        model, directory, tokenizer=tokenizer, originals=originals, passes=passes, report=state.report,
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

    Returns:
        The model, in eval mode. :func:`report` gives the receipt that was saved with it, :func:`save` writes it again.

    Raises:
        CheckpointError: names the file and what is wrong with it.
        InputError: an unknown pass, or one that needs calibration, which is :func:`optimize`'s work.
    """
    from llmopt import checkpoint
    from llmopt.checkpoint.manifest import MANIFEST

    chosen = None if passes == "saved" else choose(passes or ())
    if needy := [item.name for item in chosen or () if item.needs_calibration]:
        raise InputError(
            f"passes: expected those that need no calibration, got {needy[0]!r}; llmopt.optimize applies it"
        )
    recorded = checkpoint.recorded_passes(directory)
    where = f"{Path(directory) / MANIFEST}: passes"
    again = _recorded_choice(recorded, where) if chosen is None else chosen
    model = checkpoint.load(directory, device=device)
    in_weights = {n: options for n, options in recorded.items() if n in PASSES and PASSES[n].needs_calibration}
    loaded = Inherited(in_weights, recorded=checkpoint.recorded_report(directory))
    try:
        _apply_unmeasured(model, [item for item in again if not item.needs_calibration], loaded)
    except InputError as error:
        if chosen is None:
            raise CheckpointError(f"{where}: {error}") from error
        raise
    inherit(model, loaded)
    return model


def _recorded_choice(recorded: Mapping[str, Mapping[str, Any]], where: str) -> list[Pass]:
    chosen = []
    for name, options in recorded.items():
        if name not in PASSES:
            raise CheckpointError(f"{where}: expected names among {', '.join(PASSES)}, got {name!r}")
        known = PASSES[name].option_names()
        if strange := [option for option in options if option not in known]:
            raise CheckpointError(f"{where}: {name}: expected options among {', '.join(known)}, got {strange[0]!r}")
        # JSON has no tuples, and a pass is hashable
        values = {option: tuple(v) if isinstance(v, list) else v for option, v in options.items()}
        try:
            chosen.append(PASSES[name](**values))
        except InputError as error:
            raise CheckpointError(f"{where}: {error}") from error
    return choose(chosen)


def _apply_unmeasured(model: Any, passes: list[Pass], loaded: Inherited) -> None:
    resolved = resolve_model(model)
    ctx = PassContext(resolved, next(model.buffers()).device, lambda event: None, trials=False)
    loaded.notes.append("loaded: figures are those saved with the checkpoint, of the environment named here")
    for item in passes:
        verdict = item.check(ctx)
        if not verdict.applies:
            loaded.notes.append(f"{item.name}: not applied again: {verdict.reason}")
            _LOG.warning(loaded.notes[-1])
            continue
        applied = item.apply(ctx)
        applied.patch.enable()
        loaded.passes[item.name] = {**item.options(), **applied.settled}
        loaded.applied[item.name] = applied.details


def compare(
    models: Mapping[str, Any],
    *,
    prompt: Any = None,
    tokenizer: Any = None,
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
        tokenizer: of all the models, a transformers tokenizer. None: of each the one beside its weights, in their directory
            or in the cache of a hub's name.
        on_event: called with every :class:`~llmopt.passes.base.Event`.
        seed: of what is drawn (random ids).

    Raises:
        InputError: no model, one object under two names, a prompt that not all models can read, or models on different
            devices; also :class:`UnsupportedModelError` and :class:`ModelStateError`, as for :func:`optimize`.
    """
    return side_by_side.measure(models, prompt=prompt, tokenizer=tokenizer, on_event=on_event, seed=seed)
