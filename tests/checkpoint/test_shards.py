"""The safetensors reader and writer against the library, and the reader against malformed files."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llmopt.checkpoint import shard_reader
from llmopt.checkpoint.shard_reader import DTYPES, Shard
from llmopt.checkpoint.shard_writer import Entry, split, whole, write_shard
from llmopt.errors import CheckpointError


def random_tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {f"t.{name}": torch.randint(0, 2, (3, 5), generator=random).to(dtype) for name, dtype in DTYPES.items()}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "odd": torch.ones(7, dtype=torch.uint8)}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"k": "v"})
    shard = Shard(tmp_path / "a.safetensors")
    assert shard.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert shard.tensors[name].dtype == tensor.dtype
        got = shard.read(name)
        assert got.shape == tensor.shape
        assert torch.equal(got.float(), tensor.float()), name
    assert torch.equal(shard.read_rows("t.F32", 1, 3), tensors["t.F32"][1:3])
    shard.close()


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = random_tensors()
    written = write_shard(tmp_path / "a.safetensors", [whole(n, t) for n, t in tensors.items()])
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float()), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    data = (tmp_path / "a.safetensors").read_bytes()
    assert written.nbytes == len(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()


def test_writes_in_blocks(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(6, 4)
    entry = Entry("x", torch.float32, (6, 4), lambda: iter(tensor.t().contiguous().t().split(2)))
    write_shard(tmp_path / "a.safetensors", [entry])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensor)


def test_never_writes_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "a.safetensors", [])
    assert (tmp_path / "a.safetensors").read_text() == "precious"


def test_split() -> None:
    entries = [whole(str(n), torch.zeros(n, dtype=torch.uint8)) for n in (4, 4, 3, 20, 1, 9)]
    assert [[e.name for e in run] for run in split(entries, 10)] == [["4", "4"], ["3"], ["20"], ["1", "9"]]


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def raw(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


GOOD = header(a=entry()) + bytes(4)
ONE = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a safetensors file, got 0 bytes"),
    "seven bytes": (b"1234567", "got 7 bytes"),
    "header of 2^64-1": (b"\xff" * 8 + b"{}", "header: expected at most 2 bytes"),
    "header over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "header: expected at most"),
    "header beyond the file": (struct.pack("<Q", 50) + b"{}", "header: expected at most 2 bytes, got 50"),
    "not a safetensors file": (b"PK\x03\x04" + bytes(40), "header: expected at most"),
    "truncated": (GOOD[:-1], "truncated"),
    "trailing data": (GOOD + b"x", "trailing bytes"),
    "not UTF-8": (struct.pack("<Q", 3) + b'{"\xff', "not JSON in UTF-8"),
    "not JSON": (raw("{nonsense}"), "not JSON in UTF-8"),
    "not an object": (raw("[1, 2]"), "expected '{'"),
    "white space first": (raw(" " + ONE + "}", bytes(4)), "expected '{' as its first byte"),
    "deep nesting": (raw('{"a":' * 200_000), "not JSON in UTF-8"),
    "huge integer": (raw('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', bytes(4)), "JSON"),
    "repeated tensor": (raw(ONE + "," + ONE[1:] + "}", bytes(4)), "key 'a' appears twice"),
    "repeated key inside": (raw('{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}'), "'dtype' appears"),
    "overlap": (header(a=entry(), b=entry(offsets=(2, 6))) + bytes(6), "b: data_offsets: overlaps"),
    "hole": (header(a=entry(), b=entry(offsets=(5, 9))) + bytes(9), "b: data_offsets: leaves a hole"),
    "end before start": (header(a=entry(offsets=(4, 0))) + bytes(4), "a: data_offsets: expected"),
    "negative offset": (header(a=entry(offsets=(-4, 0))) + bytes(4), "a: data_offsets: expected"),
    "three offsets": (header(a=entry(offsets=(0, 2, 4))) + bytes(4), "a: data_offsets: expected"),
    "size and shape differ": (header(a=entry("F32")) + bytes(4), "a: expected 16 bytes"),
    "negative size": (header(a=entry(shape=(-4,))) + bytes(4), "a: shape: expected"),
    "size as text": (header(a=entry(shape=("4",))) + bytes(4), "a: shape: expected"),
    "size as float": (header(a=entry(shape=(4.0,))) + bytes(4), "a: shape: expected"),
    "size as bool": (header(a=entry(shape=(True,), offsets=(0, 1))) + bytes(1), "a: shape: expected"),
    "product wraps to 16": (
        header(a=entry(shape=(4194305, 4194305, 211106198978564), offsets=(0, 16))) + bytes(16), "a: expected"
    ),
    "unknown dtype": (header(a=entry("Q4")) + bytes(4), "a: dtype: expected one of"),
    "dtype not text": (header(a=entry([])) + bytes(4), "a: dtype: expected one of"),
    "missing key": (header(a={"dtype": "U8", "shape": [4]}) + bytes(4), "a: expected dtype, shape and data_offsets"),
    "extra key": (header(a=entry(pickle="x")) + bytes(4), "a: expected dtype, shape and data_offsets"),
    "tensor not an object": (header(a=3), "a: expected dtype, shape and data_offsets"),
    "metadata not text": (header(__metadata__={"a": 1}), "__metadata__: expected strings"),
    "metadata not an object": (header(__metadata__="x"), "__metadata__: expected strings"),
}  # fmt: skip


def open_file_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tmp_path: Path, name: str) -> None:
    data, message = MALFORMED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    open_files = open_file_count()
    with pytest.raises(CheckpointError) as error:
        Shard(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert open_file_count() == open_files


def test_the_good_file_of_the_malformed_ones(tmp_path: Path) -> None:
    for data in (GOOD, raw(ONE + "}" + " " * 9, bytes(4)), header()):
        (tmp_path / "a").write_bytes(data)
        Shard(tmp_path / "a").close()


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "MAX_TENSORS", 3)
    save_file({str(i): torch.zeros(1) for i in range(4)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="at most 3 tensors, got 4"):
        Shard(tmp_path / "a")


@pytest.mark.parametrize("kind", ["directory", "fifo", "missing", "link"])
def test_not_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    make: dict[str, Callable[[], object]] = {
        "directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "missing": lambda: None,
        "link": lambda: path.symlink_to("/dev/zero"),
    }  # fmt: skip
    make[kind]()
    with pytest.raises(CheckpointError, match=str(path)):
        Shard(path)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "a")
    shard = Shard(tmp_path / "a")
    os.truncate(tmp_path / "a", 500)
    with pytest.raises(CheckpointError, match="a: the file ended while it was being read"):
        shard.read("a")
    shard.close()


def test_mutations_never_give_another_error(tmp_path: Path) -> None:
    """Random damage is either harmless or a CheckpointError; and what the library refuses, we refuse."""
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int32)}, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    random = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(600):
        data = bytearray(good)
        for _ in range(int(torch.randint(1, 4, (1,), generator=random))):
            at = int(torch.randint(0, len(good) - 40, (1,), generator=random))
            data[at] = int(torch.randint(0, 256, (1,), generator=random))
        path = tmp_path / "bad"
        path.write_bytes(data)
        try:
            shard = Shard(path)
        except CheckpointError:
            refused += 1
            continue
        for name in shard.tensors:
            shard.read(name)
        shard.close()
        try:
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == shard.tensors.keys()
        except SafetensorError as error:
            pytest.fail(f"the library refuses what we accept: {error}")
    assert refused > 300
