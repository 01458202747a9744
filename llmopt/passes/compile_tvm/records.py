"""Schedules found by tuning, on disk: a JSON file that can be read, kept, and given to others.

One file holds the kernels of one step, or of several. It is data and no code: what its schedules may say is checked
(:mod:`.schedules`), and the step is verified where passes are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt import env
from llmopt.errors import LlmoptError

_FORMAT = "llmopt schedules 1"


def folder() -> Path:
    """Where files of records lie that nobody has chosen a place for."""
    return env.cache_folder() / "tuned"


def files() -> list[Path]:
    """Those files."""
    return sorted(folder().glob("[0-9a-f]*.json"))


def described(file: Path) -> str:
    """A file of records in a line, or why it is none."""
    try:
        records = [r for kernels in _whole(file).values() for r in kernels.values()]
    except RefusedRecordsError as error:
        return f"refused: {error}"
    faster = sum(record.schedule is not None for record in records)
    return f"schedules: {len(records)} kernels tuned, {faster} faster than by the default"


class RefusedRecordsError(LlmoptError):
    """A file of records is damaged, or none."""


@dataclass(frozen=True, slots=True)
class Record:
    """What tuning found for one kernel.

    Attributes:
        name: of the kernel, for readers.
        tried: schedules that were compiled and timed, by a search that goes on some of them again; seeds up to ``seeds`` have
            been drawn.
        done: there is nothing left to try.
        default_us: of the schedule every kernel gets, microseconds a call for one token.
        us: of the fastest; beside ``default_us`` in turns.
        schedule: the fastest, where it beats the default beyond noise; None: the default.
    """

    name: str
    tried: int
    seeds: int
    done: bool
    default_us: float
    us: float
    schedule: list[Any] | None


class Records:
    """The records of a file.

    Args:
        file: need not exist.
        target: the target they are for, as :func:`llmopt.passes.compile_tvm.compiled.target` gives it, and TVM's version:
            others in the file are left alone.

    Raises:
        RefusedRecordsError: the file is not one of records.
    """

    def __init__(self, file: Path, target: dict[str, Any]) -> None:
        self.file = file
        self._target = json.dumps(target, sort_keys=True)
        self._records = _whole(file).get(self._target, {})

    def find(self, kernel: str) -> Record | None:
        """What is known of a kernel, by the name :func:`~llmopt.passes.compile_tvm.schedules.name_of` gives it."""
        return self._records.get(kernel)

    def schedules(self) -> dict[str, list[Any]]:
        """The schedules to take, by kernel; the others have the default."""
        return {kernel: r.schedule for kernel, r in sorted(self._records.items()) if r.schedule is not None}

    def add(self, kernel: str, record: Record) -> None:
        """Keep a record. Those that others have written meanwhile stay.

        Raises:
            RefusedRecordsError: the file is not one of records any more.
            OSError: it cannot be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(self.file):
            whole = _whole(self.file)
            self._records = whole.setdefault(self._target, {})
            self._records[kernel] = record
            _write(self.file, whole)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(file: Path, whole: dict[str, dict[str, Record]]) -> None:
    """All of it, or nothing."""
    said = {of: {name: dataclasses.asdict(r) for name, r in kernels.items()} for of, kernels in whole.items()}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}-", delete=False) as new:
        try:
            json.dump({"format": _FORMAT, "targets": said}, new, indent=1, sort_keys=True)
            new.flush()
            Path(new.name).replace(file)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def _whole(file: Path) -> dict[str, dict[str, Record]]:
    """Records of every target, by kernel."""
    try:
        said = json.loads(file.read_text())
        if said["format"] != _FORMAT:
            raise ValueError(said["format"])
        return {of: {name: _record(r) for name, r in kernels.items()} for of, kernels in said["targets"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"not a file of tuning records, {_FORMAT!r} ({type(error).__name__})"
        raise RefusedRecordsError(f"{file}: {why}") from None


def _record(said: dict[str, Any]) -> Record:
    record = Record(**said)
    counts = all(type(n) is int and n >= 0 for n in (record.tried, record.seeds)) and type(record.done) is bool
    times = all(type(us) is float and 0 < us < math.inf for us in (record.default_us, record.us))
    if not (counts and times and type(record.name) is str and isinstance(record.schedule, list | None)):
        raise ValueError(record.name)
    return record
