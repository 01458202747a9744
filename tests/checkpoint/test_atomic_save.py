"""A save happens whole or not at all: full disks, crashes, kills, and directories that are not ours."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import logits, quantize, tiny

from llmopt.checkpoint import load, save, shard_writer, staging, writer
from llmopt.errors import CheckpointError


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def names(directory: Path) -> list[str]:
    return [p.name for p in directory.iterdir()]


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    directory = save(tiny("qwen3"), tmp_path / "out", passes={"old": {}})
    return directory, contents(directory)


class FailAt:
    """Stands in for a function: fails at the n-th call, as a full disk does."""

    def __init__(self, real: Any, at: int) -> None:
        self.real, self.left = real, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        (shard_writer, "_write", 0), (shard_writer, "_write", 1), (shard_writer, "_write", 30), (writer, "_write_json", 0),
        (writer, "_write_json", 1), (writer, "_write_json", 2), (staging, "_sync", 0), (staging, "_sync", 4),
        (staging, "_exchange", 0), (os, "fsync", 0), (os, "fsync", 3),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)  # fmt: skip
def test_disk_full(
    old: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: int
) -> None:
    directory, before = old
    model = tiny("qwen3")
    quantize(model)
    monkeypatch.setattr(module, name, FailAt(getattr(module, name), at))
    with pytest.raises(CheckpointError, match=r"cannot be saved, nothing was changed.*No space left"):
        save(model, directory)
    monkeypatch.undo()
    assert contents(directory) == before
    assert names(directory.parent) == [directory.name]


def test_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="free disk space"):
        save(tiny("qwen3"), tmp_path / "out")
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(old: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    directory, before = old
    monkeypatch.setattr(shard_writer, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tiny("qwen3"), directory)
    assert contents(directory) == before
    assert names(directory.parent) == [directory.name]


CHILD = """
    import os, sys
    sys.path.insert(0, {tools!r})
    from checkpoint_tools import quantize, tiny
    from llmopt.checkpoint import save, shard_writer, staging
    calls = 0
    def die(real, at, how):
        def call(*args):
            global calls
            calls += 1
            if calls == at:
                how()
            return real(*args)
        return call
    where, at = sys.argv[2], int(sys.argv[3])
    how = (lambda: os._exit(9)) if sys.argv[4] == "exit" else (lambda: os.kill(os.getpid(), 9))
    module = dict(_write=shard_writer, _sync=staging, _put_in_place=staging)[where]
    setattr(module, where, die(getattr(module, where), at, how))
    model = tiny("qwen3")
    quantize(model)
    save(model, sys.argv[1])
"""


@pytest.mark.parametrize(
    ("where", "at", "how"),
    [("_write", 1, "exit"), ("_write", 25, "kill"), ("_sync", 3, "exit"), ("_put_in_place", 1, "kill")],
)
def test_killed(old: tuple[Path, dict[str, bytes]], where: str, at: int, how: str) -> None:
    directory, before = old
    code = textwrap.dedent(CHILD.format(tools=str(Path(__file__).parent)))
    command = [sys.executable, "-c", code, str(directory), where, str(at), how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (9 if how == "exit" else -signal.SIGKILL), done.stderr
    assert contents(directory) == before
    left = [name for name in names(directory.parent) if name != directory.name]
    assert len(left) == 1
    assert left[0].startswith(".out.llmopt-tmp-")
    # the next save clears what the dead one left, and works
    model = tiny("qwen3")
    save(model, directory)
    assert names(directory.parent) == [directory.name]
    assert torch.equal(logits(load(directory)), logits(model))


def test_a_save_in_progress_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".out.llmopt-tmp-1-abcd"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    save(tiny("qwen3"), tmp_path / "out")
    assert other.is_dir()
    os.close(lock)
    save(tiny("qwen3"), tmp_path / "out")
    assert not other.exists()


def test_replaces_its_own_checkpoint(old: tuple[Path, dict[str, bytes]]) -> None:
    directory, before = old
    model = tiny("qwen3")
    originals = quantize(model)
    inode = directory.stat().st_ino
    save(model, directory, originals=originals)
    assert directory.stat().st_ino != inode
    assert contents(directory).keys() == before.keys() | {"llmopt.scales"}
    assert names(directory.parent) == [directory.name]


def test_without_an_exchange(old: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot swap two directories, the old one steps aside, and comes back if the new one cannot."""
    directory, before = old
    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    real, calls = Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_second)
        with pytest.raises(CheckpointError, match="broken"):
            save(tiny("qwen3"), directory)
    assert contents(directory) == before
    save(tiny("qwen3"), directory)
    assert json.loads((directory / "llmopt.json").read_text())["passes"] == {}
    assert names(directory.parent) == [directory.name]


def test_checkpoint_that_stepped_aside_is_pointed_to(tmp_path: Path) -> None:
    (tmp_path / ".out.llmopt-old-7").mkdir()
    with pytest.raises(CheckpointError, match=r"previous checkpoint at .*\.out\.llmopt-old-7"):
        load(tmp_path / "out")


@pytest.mark.parametrize("what", ["file", "other files", "their checkpoint", "extra file", "damaged llmopt.json"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    model = tiny("qwen3")
    message = {
        "file": "expected a directory", "other files": "it holds notes.txt", "their checkpoint": "it has no llmopt.json",
        "extra file": "got also notes.txt, which would be lost", "damaged llmopt.json": "llmopt.json",
    }[what]  # fmt: skip
    if what == "file":
        target.write_text("precious")
    elif what == "other files":
        target.mkdir()
        (target / "notes.txt").write_text("precious")
    elif what == "their checkpoint":
        model.save_pretrained(target)
    else:
        save(model, target)
        (target / ("notes.txt" if what == "extra file" else "llmopt.json")).write_text("precious")
    before = contents(target) if target.is_dir() else target.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        save(model, target)
    assert (contents(target) if target.is_dir() else target.read_bytes()) == before
    assert names(tmp_path) == ["out"]


def test_empty_and_nested_targets(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model = tiny("qwen3")
    for name in ("empty", "a/b/c"):
        assert save(model, tmp_path / name) == tmp_path / name
        assert torch.equal(logits(load(tmp_path / name)), logits(model))


def test_through_a_link(tmp_path: Path) -> None:
    model = tiny("qwen3")
    save(model, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert save(model, tmp_path / "link", passes={"again": {}}) == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "llmopt.json").read_text())["passes"] == {"again": {}}


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        directory = save(tiny("qwen3"), tmp_path / "out")
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o750
    assert (directory / "model.safetensors").stat().st_mode & 0o777 == 0o640


class Tokenizer:
    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")
        (Path(directory) / "sub").mkdir()
        (Path(directory) / "sub" / "template.jinja").write_text("x")


def test_tokenizer(tmp_path: Path) -> None:
    model = tiny("qwen3")
    directory = save(model, tmp_path / "out", tokenizer=Tokenizer())
    assert {"tokenizer.json", "sub/template.jinja"} < contents(directory).keys()
    # found beside the weights that the model came from, and nothing else is taken from there
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "private.txt").write_text("x")
    second = save(load(directory), tmp_path / "second")
    assert {"tokenizer.json", "tokenizer_config.json"} < contents(second).keys()
    assert "private.txt" not in contents(second)
    save(load(second), second)
    assert "tokenizer.json" in contents(second)
    # a link to somewhere else is not followed
    (tmp_path / "secret").write_text("secret")
    (second / "tokenizer.json").unlink()
    (second / "tokenizer.json").symlink_to(tmp_path / "secret")
    linked = save(load(second), tmp_path / "linked")
    assert "tokenizer_config.json" in contents(linked)
    assert "tokenizer.json" not in contents(linked)
    third = save(model, tmp_path / "third")
    assert "tokenizer.json" not in contents(third)
