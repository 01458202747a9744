"""Checks on a checkpoint directory before any of it is trusted.

Nothing is executed and nothing outside the directory is read: pickles are refused, and every file's real path must lie
in the directory's real path. One exception: in a Hugging Face cache the files of ``models--X/snapshots/REVISION`` are
symbolic links into ``models--X/blobs``, and those are followed. Hard links are allowed: making one needs write access
to the directory, and download tools use them.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmopt.checkpoint.shard_reader import MAX_TENSORS, Shard
from llmopt.errors import CheckpointError

MAX_JSON_BYTES = 200_000_000  # the index of a model of half a million tensors is 60 MB
CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NEAREST_POOL = 2000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(slots=True)
class CheckpointFiles:
    """An opened checkpoint: parsed configs and the headers of every shard. No tensor has been read."""

    directory: Path
    config: dict[str, Any]
    shards: list[Shard]
    owner: dict[str, Shard]  # by tensor name

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def open_checkpoint(directory: str | os.PathLike[str]) -> CheckpointFiles:
    """Find, check and open a checkpoint's files.

    Raises:
        CheckpointError: anything about the directory is missing, malformed or unsafe; names the file and the key.
    """
    path = Path(directory)
    if not path.is_dir():
        kind = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{path}: expected a checkpoint directory, got {kind}{_interrupted_save(path)}")
    root = path.resolve()
    config = read_json(root, CONFIG)
    shards: list[Shard] = []
    try:
        owner = _open_shards(root, shards)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return CheckpointFiles(root, config, shards, owner)


def contained(root: Path, name: str) -> Path:
    """The real path of file ``name`` of the checkpoint at ``root`` (itself a real path).

    Raises:
        CheckpointError: missing, not a regular file, or outside the checkpoint.
    """
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
        raise CheckpointError(f"{root}: {name!r}: expected the name of a file in the checkpoint")
    try:
        real = (root / name).resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise CheckpointError(f"{root}: {name}: no such file ({error})") from None
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not real.is_relative_to(root) and real.parent != blobs:
        raise CheckpointError(f"{root}: {name}: leaves the checkpoint directory (it is a link to {real})")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{root}: {name}: expected a regular file")
    return real


def has(root: Path, name: str) -> bool:
    """True when the directory has an entry of that name, of whatever kind."""
    return os.path.lexists(root / name)


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: missing, too large, or not a JSON object.
    """
    path = contained(root, name)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, got {size}")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (nearest: a, b)`` or nothing, for error messages."""
    parent, _, leaf = name.rpartition(".")
    # names of the same module, or of the same tensor elsewhere; a checkpoint can have 200 000 in all
    likely = [k for k in known if k.startswith(f"{parent}.") or k.endswith(f".{leaf}")]
    close = difflib.get_close_matches(name, likely[:_NEAREST_POOL], n=2)
    return f" (nearest: {', '.join(close)})" if close else ""


def _open_shards(root: Path, shards: list[Shard]) -> dict[str, Shard]:
    index = None if has(root, SINGLE) else _index_name(root)
    weight_map = {} if index is None else _weight_map(root, index)
    if index is not None:
        names = sorted(set(weight_map.values()))
    else:
        names = [SINGLE if has(root, SINGLE) else _only_safetensors(root)]
    # all paths before the first file is opened: a bad entry must not depend on its place in the index
    paths = [contained(root, name) for name in names]
    owner: dict[str, Shard] = {}
    by_name: dict[str, Shard] = {}
    for name, path in zip(names, paths, strict=True):
        shard = Shard(path)
        shards.append(shard)
        by_name[name] = shard
        for tensor in shard.tensors:
            if tensor in owner:
                raise CheckpointError(f"{path}: {tensor}: is in {owner[tensor].path.name} as well")
            owner[tensor] = shard
        if len(owner) > MAX_TENSORS:
            raise CheckpointError(f"{root}: expected at most {MAX_TENSORS} tensors in all, got more")
    for tensor, name in weight_map.items():
        if tensor not in by_name[name]:
            raise CheckpointError(f"{root}: {index}: weight_map: {tensor}: is not in {name}")
    return owner


def _index_name(root: Path) -> str | None:
    if has(root, INDEX):
        return INDEX
    found = sorted(p.name for p in root.glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise CheckpointError(f"{root}: expected one index of shards, got {', '.join(found)}")
    return found[0] if found else None


def _weight_map(root: Path, index: str) -> dict[str, str]:
    weight_map = read_json(root, index).get("weight_map")
    where = f"{root / index}: weight_map"
    if not isinstance(weight_map, dict) or not weight_map:
        kind = type(weight_map).__name__
        raise CheckpointError(f"{where}: expected an object of tensor names and file names, got {kind}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: {tensor}: expected the name of a .safetensors file, got {name!r}")
    return weight_map


def _only_safetensors(root: Path) -> str:
    """Older tools name the file after bits and group size."""
    found = sorted(p.name for p in root.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{root}: expected {SINGLE} or {INDEX}, got {', '.join(found[:4])} without an index")
    pickles = sorted(p.name for p in root.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{root}: expected {SINGLE}, got only {', '.join(pickles[:3])}: pickles can run code and are not read; "
            "convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{root}: expected {SINGLE} or {INDEX}, got neither")


def _interrupted_save(path: Path) -> str:
    """Where a save was cut off between moving the old checkpoint away and the new one in."""
    left = sorted(path.parent.glob(f".{path.name}.llmopt-old-*")) if path.parent.is_dir() else []
    return f"; an interrupted save left the previous checkpoint at {left[0]}" if left else ""
