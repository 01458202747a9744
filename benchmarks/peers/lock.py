"""A lock file for machines that several measurements share."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

HOLD_S = 45.0  # after that others get their turn
_GAP_S = 0.3  # long enough for a waiting process to take the lock


class Lock:
    """Held from one timed call to the next, so that neighbours in a round share their conditions, but not for long.

    Args:
        path: the file to lock; None locks nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._since = path, 0.0
        self._file: IO[str] | None = None

    def hold(self) -> None:
        """Have the lock when this returns. One held for ``HOLD_S`` is given up first, and waited for anew."""
        if self._path is None:
            return
        if self._file is not None and time.monotonic() - self._since > HOLD_S:
            self.release()
            time.sleep(_GAP_S)
        if self._file is None:
            file = self._path.open("a")
            fcntl.flock(file, fcntl.LOCK_EX)
            self._file, self._since = file, time.monotonic()

    def release(self) -> None:
        """Give it up, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None
