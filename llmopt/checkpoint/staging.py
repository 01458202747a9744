"""A directory that appears whole or not at all.

Files are written into a hidden sibling, flushed, and put in place by one rename. Where a checkpoint stands already, the
two directories trade names in one step (Linux ``renameat2``); elsewhere the old one is first moved to a hidden sibling,
from which it can be moved back by hand should the machine stop between the two renames.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_TMP, _OLD = "llmopt-tmp-", "llmopt-old-"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory beside ``target`` that takes its place when the block ends without an error.

    On an error nothing is left behind. What a killed process left behind is removed by the next save to the same place:
    the lock on it is gone with the process.

    Raises:
        OSError: no space, no permission.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    work = target.parent / f".{target.name}.{_TMP}{os.getpid()}-{secrets.token_hex(4)}"
    work.mkdir()
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
        _sync_tree(work)
        _put_in_place(work, target)
        _sync(target.parent)
    finally:
        os.close(lock)
        # after an exchange this is the old checkpoint, after a plain rename nothing
        shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.{_TMP}*"):
        lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
        shutil.rmtree(left, ignore_errors=True)


def _put_in_place(work: Path, target: Path) -> None:
    # POSIX renames a directory over an empty one
    if not target.exists() or not any(target.iterdir()):
        work.rename(target)
        return
    if _exchange(work, target):
        return
    old = target.parent / f".{target.name}.{_OLD}{os.getpid()}"
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync_tree(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
