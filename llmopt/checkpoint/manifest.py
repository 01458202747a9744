"""``llmopt.json``: what a checkpoint written by llmopt says about itself beyond the standard files.

Which passes were active with which options, library versions, the receipt, hashes of the weight files, and how the head
and the embedding, which lie unquantized in the standard files, are quantized again on load.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import llmopt
from llmopt.checkpoint.safety import has, read_json
from llmopt.errors import CheckpointError
from llmopt.models.base import FLOAT_DTYPES
from llmopt.ops.int4_linear.layout import KERNEL_GROUPS

MANIFEST = "llmopt.json"
SCALES = "llmopt.scales"  # safetensors; named so that nobody takes it for a shard
FORMAT_VERSION = 1
_GROUP_SIZES = (*KERNEL_GROUPS, -1)
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
_LIBRARIES = ("torch", "transformers", "safetensors", "apache-tvm-ffi")


@dataclass(frozen=True, slots=True)
class Requantized:
    """A head or an embedding that is quantized again on load, from ``tensor`` and the scales in ``llmopt.scales``."""

    kind: str  # "linear" | "embedding"
    tensor: str  # name in the standard files
    bits: int
    group_size: int
    sha256: str  # of the packed bytes
    scales: str  # prefix in llmopt.scales: NAME.scales [N, G], NAME.zeros, NAME.perm; shared where the bytes are
    asymmetric: bool = False
    permuted: bool = False
    dtype: str = ""  # of an embedding's rows


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and hash of a file as it was written."""

    nbytes: int
    sha256: str


@dataclass(slots=True)
class Manifest:
    """The contents of ``llmopt.json``."""

    passes: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> options, in run order
    requantized: dict[str, Requantized] = field(default_factory=dict)  # by module name
    weights: dict[str, FileRecord] = field(default_factory=dict)  # every file that holds tensors
    files: list[str] = field(default_factory=list)  # every file of the checkpoint but this one
    report: dict[str, Any] | None = None
    llmopt_version: str = llmopt.__version__
    libraries: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def library_versions() -> dict[str, str]:
    """Versions of what a checkpoint's bytes can depend on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain JSON values, the most telling keys first."""
    data = asdict(manifest)
    first = ("format_version", "llmopt_version", "libraries", "passes", "requantized")
    return {key: data.pop(key) for key in first} | data


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of the checkpoint at ``root``; None where another tool wrote it.

    Raises:
        CheckpointError: it is malformed, or of a newer format.
    """
    if not has(root, MANIFEST):
        return None
    data = read_json(root, MANIFEST)
    path = root / MANIFEST
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {version!r}; "
            "it was written by another version of llmopt"
        )
    report = data.get("report")
    if report is not None and not isinstance(report, dict):
        raise CheckpointError(f"{path}: report: expected an object or null, got {type(report).__name__}")
    return Manifest(
        passes={name: _options(path, name, item) for name, item in _typed(path, data, "passes", dict).items()},
        requantized={
            name: _requantized(path, name, item) for name, item in _typed(path, data, "requantized", dict).items()
        },
        weights={name: _file(path, name, item) for name, item in _typed(path, data, "weights", dict).items()},
        files=[_name(path, item) for item in _typed(path, data, "files", list)],
        report=report,
        llmopt_version=_typed(path, data, "llmopt_version", str),
        libraries=_typed(path, data, "libraries", dict),
    )


def _typed(path: Path, data: Mapping[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{path}: {key}: expected {kind.__name__}, got {value!r:.80}")
    return value


def _options(path: Path, name: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise CheckpointError(f"{path}: passes: {name}: expected an object of options, got {item!r:.80}")
    return item


def _name(path: Path, item: Any) -> str:
    if not isinstance(item, str):
        raise CheckpointError(f"{path}: files: expected file names, got {item!r:.80}")
    return item


def _file(path: Path, name: str, item: Any) -> FileRecord:
    if not isinstance(item, dict):
        raise CheckpointError(f"{path}: weights: {name}: expected an object, got {item!r:.80}")
    return FileRecord(_typed(path, item, "nbytes", int), _typed(path, item, "sha256", str))


def _requantized(path: Path, name: str, item: Any) -> Requantized:
    where = f"{path}: requantized: {name}"
    if not isinstance(item, dict):
        raise CheckpointError(f"{where}: expected an object, got {item!r:.80}")
    kinds = {"bits": int, "group_size": int, "asymmetric": bool, "permuted": bool}
    keys = ("kind", "tensor", "bits", "group_size", "sha256", "scales", "asymmetric", "permuted", "dtype")
    values = {key: _typed(path, item, key, kinds.get(key, str)) for key in keys}
    record = Requantized(**values)
    if record.kind not in ("linear", "embedding"):
        raise CheckpointError(f"{where}: kind: expected 'linear' or 'embedding', got {record.kind!r}")
    if record.bits not in (4, 8) or (record.bits == 8 and record.asymmetric):
        raise CheckpointError(f"{where}: bits: expected 4, or 8 and symmetric, got {record.bits}")
    if record.kind == "embedding" and record.dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype: expected one of {', '.join(_DTYPES)}, got {record.dtype!r}")
    if record.group_size not in _GROUP_SIZES:
        raise CheckpointError(f"{where}: group_size: expected one of {_GROUP_SIZES}, got {record.group_size}")
    return record
