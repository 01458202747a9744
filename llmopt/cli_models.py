"""What the command line opens: a checkpoint directory, a published shape, a calibration file. Local files only."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmopt.errors import CalibrationError, CheckpointError, InputError
from llmopt.measure.report import Report


class Opened(NamedTuple):
    """A model in eval mode and the tokenizer beside it, if there is one."""

    model: Any
    tokenizer: Any | None


def open_model(directory: str | Path, *, eager: bool = False, passes: Literal["saved"] | None = "saved") -> Opened:
    """Load a local checkpoint: what ``llmopt.save`` wrote, a GPTQ checkpoint, or a plain Hugging Face one.

    Args:
        directory: holds config.json and safetensors. Nothing is fetched, and no code from it is run.
        eager: load a plain checkpoint as the baseline is: by transformers, with eager attention and experts.
        passes: as for ``llmopt.load``; None for a model that is to be optimized.

    Raises:
        InputError: no such directory, or quantized by another method.
        UnsupportedModelError: a model type that llmopt does not know.
        CheckpointError: it cannot be read.
    """
    path = Path(directory)
    config = read_config(path)
    from llmopt.models import family_for

    family_for(str(config.get("model_type")))
    method = _quant_method(config)
    if method not in (None, "gptq"):
        raise InputError(
            f"{path}: expected plain or GPTQ weights, got a checkpoint quantized by {method}; use the original one"
        )
    if eager and method is None:
        return Opened(_load_plain_eager(path), open_tokenizer(path))
    import llmopt

    return Opened(llmopt.load(path, passes=passes).eval(), open_tokenizer(path))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory; quick, for a check before anything else.

    Raises:
        InputError: no such directory.
        CheckpointError: no config.json, or not a JSON object.
    """
    if not path.is_dir():
        raise InputError.argument("model", expected="a local checkpoint directory", got=str(path))
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no config.json, so this is not a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def _quant_method(config: dict[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _load_plain_eager(path: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, attn_implementation="eager", experts_implementation="eager",
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: {reason[0]}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would go on with random weights in their place
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, first {', '.join(missing[:3])}")
    return model.eval()


def open_tokenizer(path: Path) -> Any | None:
    """The tokenizer of a checkpoint directory, or None when it has no tokenizer files."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from error


def read_calibration(file: Path) -> Any:
    """Calibration data: a .json file with a list of texts or of token-id lists, or else one UTF-8 text.

    Raises:
        CalibrationError: it cannot be read, or is not of that form.
    """
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text) if file.suffix == ".json" else text
    except (OSError, ValueError) as error:
        raise CalibrationError(f"calibration: {file}: {error}") from error
    if file.suffix != ".json":
        return data
    if not isinstance(data, list) or not all(_is_text_or_ids(item) for item in data):
        raise CalibrationError(f"calibration: {file}: expected a list of texts or of lists of token ids")
    return data


def _is_text_or_ids(item: object) -> bool:
    return isinstance(item, str) or (isinstance(item, list) and all(type(token) is int for token in item))


def select_passes(names: str | None, settings: list[str], *, rivals: bool = False) -> list[Any] | None:
    """Passes by name, with options set; None leaves the choice to ``optimize``.

    Args:
        names: comma-separated, or None for all.
        settings: ``PASS.OPTION=VALUE`` each; the value is a Python literal, or else text.
        rivals: compile_tvm times its rival too, unless its backend is set.

    Raises:
        InputError: unknown pass or option, or a setting that is not of that form.
    """
    if names is None and not settings:
        return None
    from llmopt.passes import PASSES

    wanted = list(PASSES) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    options: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for name in wanted:
        if name not in PASSES:
            raise InputError.argument("--passes", expected=" | ".join(PASSES), got=name)
    for setting in settings:
        target, found, value = setting.partition("=")
        name, dot, option = target.partition(".")
        if not found or not dot or name not in options:
            raise InputError.argument(
                "--set", expected=f"PASS.OPTION=VALUE, PASS one of {', '.join(options)}", got=setting
            )
        known = PASSES[name].option_names()
        if option not in known:
            raise InputError.argument(f"--set {name}", expected=f"one of {', '.join(known)}", got=option)
        options[name][option] = _literal(value)
    if rivals and "compile_tvm" in options:
        options["compile_tvm"].setdefault("backend", "auto")
    return [PASSES[name](**options[name]) for name in wanted]


def settings(
    passes: str | None, options: list[str] | None, calibration: Path | None, *, measure: bool | str,
    quality_budget: float | None, seed: int, rivals: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments of ``llmopt.optimize``, checked as far as that goes without a model."""
    return {
        "passes": select_passes(passes, options or [], rivals=rivals),
        "calibration": read_calibration(calibration) if calibration is not None else None,
        "measure": measure,
        "quality_budget": quality_budget,
        "seed": seed,
    }


def _literal(text: str) -> Any:
    lowered = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        return ast.literal_eval(lowered)
    except (ValueError, SyntaxError):
        return text


def read_report(file: Path) -> Report:
    """A saved receipt.

    Raises:
        InputError: it is not one.
    """
    try:
        return Report.from_json(file)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: not a report that llmopt wrote: {error}") from error


def open_models(directories: list[Path]) -> dict[str, Any]:
    """Several checkpoints, loaded one after the other: name -> model. A directory given twice is loaded twice.

    Raises:
        InputError: a path that is no directory, or a checkpoint quantized by another method.
        CheckpointError: a checkpoint that cannot be read.
    """
    # before the first is loaded
    for path in directories:
        read_config(path)
    return {name: open_model(path).model for name, path in zip(_names(directories), directories, strict=True)}


def _names(paths: list[Path]) -> list[str]:
    """The last part of each path, or all of it where two have the same; numbered where even that is the same."""
    last = [path.resolve().name for path in paths]
    names = [name if last.count(name) == 1 else str(path) for name, path in zip(last, paths, strict=True)]
    return [name if names.count(name) == 1 else f"{name} #{i + 1}" for i, name in enumerate(names)]
