"""Reading safetensors files, strictly, and one tensor at a time.

Plain reads into fresh memory rather than a memory map: mapped pages count as resident until the file is closed, which
would double the memory that loading needs. The header is checked in full before anything is allocated: beyond what the
safetensors library refuses, also white space before it, repeated keys and absurd numbers of tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 500_000  # DeepSeek-V3 with every expert apart has 190 000, over many files
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its bytes are ``file[start:stop]``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Shard:
    """An open safetensors file.

    Args:
        path: a regular file; symbolic links must have been resolved by the caller.

    Raises:
        CheckpointError: the file cannot be read or is malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own."""
        info = self.tensors[name]
        return self._load(name, info.dtype, info.shape, info.start)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` of the first dimension."""
        info = self.tensors[name]
        row_bytes = (info.stop - info.start) // info.shape[0]
        return self._load(name, info.dtype, (stop - start, *info.shape[1:]), info.start + start * row_bytes)

    def _load(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        self._read_into(raw.numpy().data, offset, name)
        return raw.view(dtype).reshape(shape)

    def _read_into(self, target: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(target):
            try:
                got = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {what}: cannot be read: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(f"{self.path}: {what}: the file ended while it was being read")
            done += got

    def _read_header(self) -> dict[str, TensorInfo]:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path}: expected a regular file")
        size = status.st_size
        if size < 8:
            raise CheckpointError(f"{self.path}: expected a safetensors file, got {size} bytes")
        prefix = bytearray(8)
        self._read_into(memoryview(prefix), 0, "header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(
                f"{self.path}: header: expected at most {min(MAX_HEADER_BYTES, size - 8)} bytes, got {length} "
                "(not a safetensors file, or truncated)"
            )
        header = bytearray(length)
        self._read_into(memoryview(header), 8, "header")
        return _parse_header(self.path, bytes(header), data_start=8 + length, size=size)


def _parse_header(path: Path, header: bytes, *, data_start: int, size: int) -> dict[str, TensorInfo]:
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: header: expected '{{' as its first byte, got {header[:1]!r}")
    # counted before parsing: a header of nothing but tiny tensors takes a gigabyte as Python objects
    count = header.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path}: header: expected at most {MAX_TENSORS} tensors, got {count}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: header: key {_shown(key)} appears twice")
            found[key] = value
        return found

    try:
        # the format allows padding with spaces after the JSON
        entries = json.loads(header.decode("utf-8").rstrip(" "), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: header: not JSON in UTF-8: {error}") from None
    _check_metadata(path, entries.pop("__metadata__", {}))
    tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start=data_start, size=size)
    return tensors


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__: expected strings, got {_shown(metadata)}")


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {_shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, got {_shown(dtype)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: shape: expected a list of sizes, got {_shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets: expected [begin, end], got {_shown(offsets)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize  # Python integers: cannot overflow
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: expected {nbytes} bytes for {dtype} {shape}, got data_offsets of {offsets[1] - offsets[0]}"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], *, data_start: int, size: int) -> None:
    """Tensors must cover the file without holes or overlaps: nothing else can hide in it, and nothing is read twice."""
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name}: data_offsets: {kind}")
        position = info.stop
    if position != size:
        problem = "truncated" if position > size else "has trailing bytes"
        raise CheckpointError(f"{path}: expected {position} bytes, got {size}: the file {problem}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
