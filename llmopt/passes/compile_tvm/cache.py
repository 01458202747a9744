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
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
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
        """Of library and description; 0 once it is gone."""
        return sum(f.stat().st_size for f in (self.library, self.folder / _ENTRY) if f.exists())


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
        """Keep a library; whatever stood in its place goes.

        Raises:
            RefusedEntryError: the folder is not this user's alone.
            OSError: it cannot be written to.
        """
        self._own_folder()
        key = key_of(made_from)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".new-") as new:
            made = Path(new) / key
            made.mkdir(mode=0o700)
            shutil.copyfile(library, made / _LIBRARY)
            said = {"made_from": made_from, "kernels": list(kernels)}
            text = json.dumps({**said, "sha256": _hash(said, made / _LIBRARY)}, indent=1)
            (made / _ENTRY).write_text(text)
            for file in made.iterdir():
                file.chmod(0o600)
            final = self.folder / key
            if os.path.lexists(final):
                final.rename(Path(new) / "old")
            made.rename(final)
        return self._read(final)

    @contextlib.contextmanager
    def building(
        self, made_from: dict[str, Any], patience_s: float = 600.0, on_wait: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """One builder of an entry at a time, over all processes; the others wait, and then find it.

        Args:
            made_from: as :meth:`find` takes it.
            patience_s: how long to wait, in seconds.
            on_wait: called once where another is building.

        Raises:
            RefusedEntryError: the folder is not this user's alone.
            OSError: it cannot be written to; TimeoutError: another builder takes longer than ``patience_s``.
        """
        self._own_folder()
        handle = os.open(self.folder / f".{key_of(made_from)}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            until, free = time.monotonic() + patience_s, _locked(handle)
            if not free and on_wait is not None:
                on_wait()
            while not free:
                if time.monotonic() > until:
                    raise TimeoutError(f"{self.folder}: another process has been building this for {patience_s:.0f} s")
                time.sleep(0.05)
                free = _locked(handle)
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
        """Remove all entries, and what broken-off writers left; their number.

        Raises:
            RefusedEntryError: the folder is a link, or not this user's alone.
        """
        if not os.path.lexists(self.folder):
            return 0
        _private(self.folder, stat.S_ISDIR)
        entries = [path for path in self.folder.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
        for path in [*entries, *self.folder.glob(".new-*")]:
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
        return len(entries)

    def _own_folder(self) -> None:
        for folder in [*reversed(self.folder.parents), self.folder]:
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
        self._check_folder()

    def _check_folder(self) -> None:
        _private(self.folder, stat.S_ISDIR)
        for parent in self.folder.resolve().parents:
            # whoever can write to a folder above can put another in this one's place, unless it is sticky as /tmp is
            found = parent.stat()
            open_to_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
            if open_to_others or found.st_uid not in (0, os.getuid()):
                raise RefusedEntryError(f"{parent}: others may write to it (mode {stat.S_IMODE(found.st_mode):o})")

    def _read(self, folder: Path) -> Entry:
        try:
            return self._read_checked(folder)
        except OSError as error:  # gone meanwhile, or never whole
            raise RefusedEntryError(f"{folder}: {error.strerror}") from None

    def _read_checked(self, folder: Path) -> Entry:
        self._check_folder()
        _private(folder, stat.S_ISDIR)
        for name in (_ENTRY, _LIBRARY):
            _private(folder / name, stat.S_ISREG)
        try:
            said = json.loads((folder / _ENTRY).read_text())
            digest = said.pop("sha256")
            made_from, kernels = said["made_from"], tuple(str(name) for name in said["kernels"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RefusedEntryError(f"{folder / _ENTRY}: not an entry's description ({error})") from None
        if _hash(said, folder / _LIBRARY) != digest:
            raise RefusedEntryError(f"{folder}: not what was written (its hash is another)")
        if key_of(made_from) != folder.name:
            raise RefusedEntryError(f"{folder}: made from something else than its name says")
        return Entry(folder.name, folder, made_from, kernels)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _private(path: Path, kind: Callable[[int], bool]) -> None:
    """Refuse what is not this user's own, or what others may write to."""
    found = path.lstat()
    if not kind(found.st_mode):
        raise RefusedEntryError(f"{path}: not a plain {'folder' if kind is stat.S_ISDIR else 'file'}")
    if found.st_uid != os.getuid():
        raise RefusedEntryError(f"{path}: belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RefusedEntryError(f"{path}: others may write to it (mode {stat.S_IMODE(found.st_mode):o})")


def _hash(said: dict[str, Any], library: Path) -> str:
    """Over an entry's description and its library."""
    with library.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashlib.sha256(json.dumps([said, digest], sort_keys=True).encode()).hexdigest()
