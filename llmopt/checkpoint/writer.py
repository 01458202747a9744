"""Writing a checkpoint: a standard Hugging Face directory that other tools read, plus ``llmopt.json``."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from llmopt.checkpoint import manifest as manifests
from llmopt.checkpoint.entries import Plan, Planner, model_dtype
from llmopt.checkpoint.manifest import MANIFEST, SCALES, FileRecord, Manifest
from llmopt.checkpoint.quant_config import check_format, quantization_config
from llmopt.checkpoint.safety import CONFIG, INDEX, SINGLE, contained, has
from llmopt.checkpoint.shard_writer import WrittenFile, split, write_shard
from llmopt.checkpoint.skeleton import GENERATION_CONFIG
from llmopt.checkpoint.staging import staged
from llmopt.errors import CheckpointError, UnsupportedModelError
from llmopt.measure.report import Report
from llmopt.models import family_for

_log = logging.getLogger("llmopt")
MAX_SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# of a config in memory that must not travel: code of the source's repository, quantization that is written afresh
_NOT_WRITTEN = ("auto_map", "quantization_config", "_name_or_path")


@torch.no_grad()
def save(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    originals: Mapping[str, torch.Tensor] | None = None,
    passes: Mapping[str, Mapping[str, Any]] | None = None,
    report: Report | None = None,
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a model as a checkpoint that other tools can read, and that :func:`load` restores exactly.

    Quantized linears and experts are written in the GPTQ format, experts one by one under their original names. Head
    and embedding, which the format cannot hold, are written unquantized and quantized again, identically, on load.

    The directory appears whole or not at all: a crash or a full disk leaves a checkpoint that was there untouched.

    Args:
        model: a causal LM of a supported family, optimized or not.
        directory: where to; must be new, empty, or a checkpoint that llmopt wrote.
        tokenizer: saved with it. None: the tokenizer files of the directory that the model came from, if there are any.
        originals: unquantized tensors by full parameter name (``model.embed_tokens.weight``) for modules that were
            quantized by rounding; without them the dequantized values are written.
        passes: the active passes in run order, name -> options; goes into ``llmopt.json``. None: those that the report
            says were kept.
        report: the receipt; goes into ``llmopt.json``.
        checkpoint_format: ``gptq`` (v1) is read most widely, and has no word for a zero point of 0: such groups of
            asymmetric weights are written mirrored, with a negative scale. ``gptq_v2`` stores them as they are;
            GPTQModel takes asymmetric weights from other tools only in that form.
        max_shard_bytes: weight files are split above this size.

    Returns:
        The checkpoint's path.

    Raises:
        InputError: an argument cannot be used, or the model's family is not supported.
        CheckpointError: the directory holds something else, or the disk is full.
    """
    check_format("checkpoint_format", checkpoint_format)
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"model: expected a transformers causal LM, got {type(model).__name__}")
    family = family_for(config.model_type)
    target = Path(directory).resolve()
    _check_target(target)
    plan = Planner(model, family, originals or {}, v2=checkpoint_format == "gptq_v2").run()
    if passes is None:
        passes = {} if report is None else {row.name: row.options for row in report.kept()}
    record = Manifest(
        passes={name: dict(options) for name, options in passes.items()},
        requantized=plan.requantized, report=None if report is None else report.to_dict(),
        libraries=manifests.library_versions(),
    )  # fmt: skip
    dtype = str(model_dtype(model, family)).removeprefix("torch.")
    try:
        _check_space(target, plan)
        with staged(target) as work:
            weights = _write_weights(work, plan, max_shard_bytes)
            record.weights = {w.name: FileRecord(w.nbytes, w.sha256) for w in weights}
            _write_configs(work, model, plan, dtype=dtype, v2=checkpoint_format == "gptq_v2")
            _write_tokenizer(work, tokenizer, config)
            record.files = sorted(str(p.relative_to(work)) for p in work.rglob("*") if p.is_file())
            _write_json(work / MANIFEST, manifests.to_json(record))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be saved, nothing was changed: {error}") from error
    return target


def _check_target(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: expected a directory to save to, got a file")
    found = {str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()}
    if not found:
        return
    known = manifests.read_manifest(target)
    if known is None:
        raise CheckpointError(
            f"{target}: expected a new or empty directory, or a checkpoint that llmopt wrote (it has no {MANIFEST}); "
            f"it holds {', '.join(sorted(found)[:3])}"
        )
    others = sorted(found - set(known.files) - {MANIFEST})
    if others:
        raise CheckpointError(
            f"{target}: expected only the checkpoint's own files, got also {', '.join(others[:3])}, which would be lost"
        )


def _check_space(target: Path, plan: Plan) -> None:
    needed = sum(entry.nbytes for entry in (*plan.entries, *plan.scales))
    there = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(f"{target}: expected {needed / 1e9:.2f} GB of free disk space, got {free / 1e9:.2f} GB")


def _write_weights(work: Path, plan: Plan, max_shard_bytes: int) -> list[WrittenFile]:
    runs = split(plan.entries, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(runs):05}.safetensors" for i in range(len(runs))]
    if len(runs) == 1:
        names = [SINGLE]
    written = [write_shard(work / name, run) for name, run in zip(names, runs, strict=True)]
    if len(runs) > 1:
        total = sum(entry.nbytes for entry in plan.entries)
        where = {entry.name: name for name, run in zip(names, runs, strict=True) for entry in run}
        _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    if plan.scales:
        written.append(write_shard(work / SCALES, plan.scales))
    return written


def _write_configs(work: Path, model: Any, plan: Plan, *, dtype: str, v2: bool) -> None:
    config = json.loads(model.config.to_json_string(use_diff=True))
    for key in _NOT_WRITTEN:
        config.pop(key, None)
    config.pop("torch_dtype", None)
    config |= {"architectures": [type(model).__name__], "dtype": dtype}
    moe = family_for(model.config.model_type).moe
    if moe is not None:
        # new versions of transformers write another name, which old ones do not know
        config[moe.num_experts_key] = getattr(model.config, moe.num_experts_key)
    if plan.quantized:
        config["quantization_config"] = quantization_config(
            plan.quantized, plan.left_out, desc_act=plan.desc_act, v2=v2
        )
    _write_json(work / CONFIG, dict(sorted(config.items())))
    if model.can_generate():
        _write_json(work / GENERATION_CONFIG, json.loads(model.generation_config.to_json_string()))


def _write_tokenizer(work: Path, tokenizer: Any, config: Any) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
        return
    source = Path(getattr(config, "_name_or_path", "") or "")
    if not source.name or not source.is_dir():
        return
    root = source.resolve()
    for name in TOKENIZER_FILES:
        if not has(root, name):
            continue
        try:
            shutil.copyfile(contained(root, name), work / name)
        except CheckpointError as error:
            # not worth failing for, but a link to somewhere else must not be published
            _log.warning("tokenizer file not saved: %s", error)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
