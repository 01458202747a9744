"""Reading a checkpoint: straight into the kernels' layout, never through a float model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from llmopt.checkpoint import skeleton
from llmopt.checkpoint.hashes import HashChecks
from llmopt.checkpoint.loader import Loader
from llmopt.checkpoint.manifest import MANIFEST, SCALES, Manifest, read_manifest
from llmopt.checkpoint.quant_config import read_settings
from llmopt.checkpoint.safety import CheckpointFiles, contained, has, open_checkpoint
from llmopt.checkpoint.shard_reader import Shard
from llmopt.errors import CheckpointError, InputError
from llmopt.models.base import FLOAT_DTYPES


@torch.no_grad()
def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Any:
    """Load a model: one that :func:`save` wrote, a GPTQ checkpoint of another tool, or a plain Hugging Face checkpoint.

    GPTQ formats v1 and v2 are read, 4-bit and (symmetric) 8-bit, with or without activation order; experts are fused.
    Everything is checked from configs and headers before any weight is read. Weights are read tensor by tensor and
    packed at once: beside the model itself, memory holds little more than the largest tensor. Passes other than
    quantization are not applied (see :func:`recorded_passes`).

    Args:
        directory: a local checkpoint. Nothing is downloaded, and no code that it brings is run.
        device: where the weights go.
        dtype: of what is not quantized. None: as saved by llmopt, else as the config says.
        verify: compare the weight files of a checkpoint that llmopt wrote with their recorded hashes.

    Returns:
        The model in eval mode, without gradients, with its generation config.

    Raises:
        CheckpointError: the checkpoint is missing, malformed, inconsistent, unsafe or not supported; names the file
            and the key.
        InputError: ``dtype`` is not float32, bfloat16 or float16.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise InputError.argument("dtype", expected="torch.float32, torch.bfloat16, torch.float16 or None", got=dtype)
    files = open_checkpoint(directory)
    scales = None
    try:
        manifest = read_manifest(files.directory)
        scales = _open_scales(files, manifest)
        model = _load(files, manifest, scales, dtype=dtype, device=torch.device(device), verify=verify)
    finally:
        files.close()
        if scales is not None:
            scales.close()
    return model


def recorded_passes(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The passes that were active when a checkpoint was saved, in run order: name -> options.

    Empty for a checkpoint of another tool. Quantization needs no second application: it is in the weights.

    Raises:
        CheckpointError: no such directory, or a malformed ``llmopt.json``.
    """
    return _manifest(directory).passes


def recorded_report(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The receipt that was saved with a checkpoint, as plain JSON values, or None.

    Raises:
        CheckpointError: no such directory, or a malformed ``llmopt.json``.
    """
    return _manifest(directory).report


def _manifest(directory: str | os.PathLike[str]) -> Manifest:
    path = Path(directory)
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{path}: expected a checkpoint directory, got {got}")
    return read_manifest(path.resolve()) or Manifest()


def _load(
    files: CheckpointFiles, manifest: Manifest | None, scales: Shard | None, *, dtype: torch.dtype | None,
    device: torch.device, verify: bool,
) -> Any:  # fmt: skip
    family = skeleton.family_of(files)
    stated = skeleton.config_dtype(files)
    settings = read_settings(files)
    resolved = skeleton.build(files, family, dtype or stated)
    loader = Loader(
        files, resolved, settings=settings, manifest=manifest, scales=scales,
        dtype=dtype if manifest is not None else dtype or stated, device=device,
    )  # fmt: skip
    jobs = loader.plan()
    with HashChecks() as checks:
        if manifest is not None and verify:
            _verify(files, manifest, scales, checks)
        skeleton.fill_computed_buffers(resolved, device)
        loader.run(jobs, checks)
    return resolved.model


def _open_scales(files: CheckpointFiles, manifest: Manifest | None) -> Shard | None:
    if manifest is None or not has(files.directory, SCALES):
        return None
    return Shard(contained(files.directory, SCALES))


def _verify(files: CheckpointFiles, manifest: Manifest, scales: Shard | None, checks: HashChecks) -> None:
    shards = [*files.shards, *([scales] if scales is not None else [])]
    recorded = {contained(files.directory, name): record for name, record in manifest.weights.items()}
    for shard in shards:
        if shard.path not in recorded:
            raise CheckpointError(f"{files.directory / MANIFEST}: weights: {shard.path.name}: not recorded")
        checks.file(shard.path, recorded[shard.path])
