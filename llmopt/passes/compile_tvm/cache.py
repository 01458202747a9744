"""Compiled libraries on disk. A cache is code: an entry is loaded only from a private folder, whole, and made for this
machine.

An entry is a folder named after its key, with the library and ``entry.json``: what was compiled, for which processor, by
which versions, and the library's hash. It appears whole or not at all, since it is written elsewhere and renamed. What is
found wanting is put aside and built anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt import env
from llmopt.errors import LlmoptError

_LIBRARY, _ENTRY = "module.so", "entry.json"


class RefusedEntryError(LlmoptError):
    """An entry of the cache is damaged, of another machine, or open to others."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its key, what it was made from, and the names of the generated kernels."""

    key: str
    folder: Path
    made_from: dict[str, Any]
    kernels: tuple[str, ...]

    @property
    def library(self) -> Path:
        return self.folder / _LIBRARY

    @property
    def num_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.folder.iterdir())


def key_of(made_from: dict[str, Any]) -> str:
    """The name of an entry: a hash of all that decides what is compiled."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


class Cache:
    """Entries in one folder of the user's.

    Args:
        folder: made when first written to, for the user alone; None: :func:`llmopt.env.cache_folder`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or env.cache_folder() / "compiled"

    def find(self, made_from: dict[str, Any]) -> Entry | None:
        """The entry for this, or None where there is none.

        Raises:
            RefusedEntryError: there is one, and it must not be loaded; says why.
        """
        key = key_of(made_from)
        folder = self.folder / key
        if not os.path.lexists(folder):
            return None
        entry = self._read(folder)
        if entry.made_from != made_from:
            raise RefusedEntryError(f"{folder}: made from something else than its name says")
        return entry

    def add(self, made_from: dict[str, Any], kernels: tuple[str, ...], library: Path) -> Entry:
        """Keep a library; whatever stood in its place is put aside."""
        self._own_folder()
        key = key_of(made_from)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".new-") as new:
            made = Path(new) / key
            made.mkdir(mode=0o700)
            shutil.copyfile(library, made / _LIBRARY)
            digest = _hash(made / _LIBRARY)
            text = json.dumps({"made_from": made_from, "kernels": kernels, "sha256": digest}, indent=1)
            (made / _ENTRY).write_text(text)
            for file in made.iterdir():
                file.chmod(0o600)
            final = self.folder / key
            if os.path.lexists(final):
                final.rename(Path(new) / "old")
            made.rename(final)
        return self._read(final)

    @contextlib.contextmanager
    def building(self, made_from: dict[str, Any]) -> Iterator[None]:
        """One builder of an entry at a time, over all processes; the others wait, and then find it."""
        self._own_folder()
        handle = os.open(self.folder / f".{key_of(made_from)}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def entries(self) -> list[Entry | str]:
        """Every entry, or why it would be refused."""
        if not self.folder.is_dir():
            return []
        found: list[Entry | str] = []
        for folder in sorted(f for f in self.folder.iterdir() if not f.name.startswith(".")):
            try:
                found.append(self._read(folder))
            except RefusedEntryError as error:
                found.append(str(error))
        return found

    def clear(self) -> int:
        """Remove everything; the number of entries there were."""
        count = len(self.entries())
        if self.folder.is_dir() and not self.folder.is_symlink():
            shutil.rmtree(self.folder)
        return count

    def _own_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _private(self.folder, stat.S_ISDIR)

    def _read(self, folder: Path) -> Entry:
        _private(self.folder, stat.S_ISDIR)
        _private(folder, stat.S_ISDIR)
        for name in (_ENTRY, _LIBRARY):
            _private(folder / name, stat.S_ISREG)
        try:
            said = json.loads((folder / _ENTRY).read_text())
            made_from, kernels, digest = said["made_from"], tuple(said["kernels"]), said["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedEntryError(f"{folder / _ENTRY}: not an entry's description ({error})") from None
        if _hash(folder / _LIBRARY) != digest:
            raise RefusedEntryError(f"{folder / _LIBRARY}: not the file that was written (its hash is another)")
        if key_of(made_from) != folder.name:
            raise RefusedEntryError(f"{folder}: made from something else than its name says")
        return Entry(folder.name, folder, made_from, kernels)


def _private(path: Path, kind: Any) -> None:
    """Refuse what is not this user's own, or what others may write to."""
    try:
        found = path.lstat()
    except OSError as error:
        raise RefusedEntryError(f"{path}: {error.strerror}") from None
    if not kind(found.st_mode):
        raise RefusedEntryError(f"{path}: not a plain {'folder' if kind is stat.S_ISDIR else 'file'}")
    if found.st_uid != os.getuid():
        raise RefusedEntryError(f"{path}: belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RefusedEntryError(f"{path}: others may write to it (mode {stat.S_IMODE(found.st_mode):o})")


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
