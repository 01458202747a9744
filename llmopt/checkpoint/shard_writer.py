"""Writing safetensors files as a stream: one block of one tensor in memory at a time.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from llmopt.checkpoint.shard_reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written. ``blocks`` makes it when its turn comes: pieces which, row after row, are the tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A finished file."""

    name: str
    nbytes: int
    sha256: str


def whole(name: str, tensor: torch.Tensor) -> Entry:
    """An entry for a tensor that is at hand."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def write_shard(path: Path, entries: Sequence[Entry]) -> WrittenFile:
    """Write a new safetensors file and flush it to the disk.

    Raises:
        OSError: the disk is full, or the file cannot be written or is there already.
    """
    entries = _aligned(entries)
    digest = hashlib.sha256()
    nbytes = 0
    with path.open("xb") as file:
        for data in _stream(entries):
            _write(file, data)
            digest.update(data)
            nbytes += len(data)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, nbytes, digest.hexdigest())


def split(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries in order, in runs of at most ``max_bytes`` (a larger tensor gets a run of its own)."""
    runs: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not runs or entry.nbytes > room:
            runs.append([])
            room = max_bytes
        runs[-1].append(entry)
        room -= entry.nbytes
    return runs


def _aligned(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Readers view tensors in place, so each must start at a multiple of its element size."""
    offset = 0
    for entry in entries:
        if offset % entry.dtype.itemsize:
            return sorted(entries, key=lambda e: -e.dtype.itemsize)
        offset += entry.nbytes
    return entries


def _stream(entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, offset + entry.nbytes]
        }  # fmt: skip
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in entries:
        written = 0
        for block in entry.blocks():
            assert block.dtype == entry.dtype, f"{entry.name}: planned {entry.dtype}, made {block.dtype}"
            data = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            written += len(data)
            yield data
        assert written == entry.nbytes, f"{entry.name}: planned {entry.nbytes} bytes, made {written}"


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    file.write(data)
