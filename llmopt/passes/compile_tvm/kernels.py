"""A step's generated kernels: lowered once, tuned if asked, and built with the schedules that are on record."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmopt.errors import PassError
from llmopt.passes.base import Event
from llmopt.passes.compile_tvm.cache import key_of
from llmopt.passes.compile_tvm.compiled import Built, Lowered, build, compiling, lower, target
from llmopt.passes.compile_tvm.engine import TvmEngine
from llmopt.passes.compile_tvm.records import Records, RefusedRecordsError, folder


class StepKernels:
    """The kernels between the ops of one step.

    Args:
        engine: the step.
        file: of records; None: this step's, in the user's cache folder.

    Attributes:
        step: a name for the step, alike wherever records hold for it.
        facts: for the receipt: ``records``, the file; ``tuning``, what a search found, or ``refused``, why a file is not used.
        fell_back: what was built has other schedules than :meth:`digest` says.

    Raises:
        PassError: ``file`` is given and not one of records.
    """

    def __init__(self, engine: TvmEngine, file: Path | None) -> None:
        self._engine = engine
        made_for = {"target": target(engine.device), "apache-tvm": importlib.metadata.version("apache-tvm")}
        self.step = key_of({**made_for, "parts": list(engine.kinds), "hidden_size": engine.hidden_size})
        where = file or folder() / f"{self.step}.json"
        self.facts: dict[str, Any] = {}
        self._given, self.fell_back = file is not None, False
        self._records: Records | None = None
        try:
            self._records = Records(where, made_for)
        except RefusedRecordsError as error:
            self._refuse(str(error))
        if self._records is not None and self._records.schedules():
            self.facts["records"] = str(where)

    @functools.cached_property
    def lowered(self) -> Lowered:
        """The step in TVM's terms, its kernels without schedules."""
        with compiling():
            return lower(list(self._engine.kinds.values()), self._engine.hidden_size, target(self._engine.device))

    def chosen(self) -> dict[str, list[Any]]:
        """Schedules that beat the default one, by kernel."""
        return self._records.schedules() if self._records else {}

    def digest(self) -> str:
        """Of the schedules; another one means another library."""
        return hashlib.sha256(json.dumps(self.chosen(), sort_keys=True).encode()).hexdigest()[:16]

    def build(self) -> Built:
        """Compile.

        Raises:
            PassError: torch or TVM cannot; says why.
        """
        from llmopt.passes.compile_tvm.schedules import RefusedScheduleError

        try:
            with compiling():
                return build(self.lowered, self.chosen())
        except (RefusedScheduleError, PassError) as error:
            if not self.chosen():
                raise
            self._refuse(f"{self._records.file if self._records else ''}: {error}")
            self.fell_back = True
        with compiling():
            return build(self.lowered, {})

    def tune(self, budget_s: float, emit: Callable[[Event], None]) -> None:
        """Search for faster schedules; records are kept as they are found.

        Args:
            budget_s: seconds.
            emit: told of every kernel.

        Raises:
            PassError: a kernel cannot be compiled, or records cannot be kept in the file that was given.
        """
        if self._records is None:
            return
        started, kernels = time.perf_counter(), self.lowered.kernels
        if not kernels:
            return

        def on_kernel(name: str, finished: int) -> None:
            emit(Event("progress", "compile_tvm", f"tuning {name}", finished, len(kernels)))

        try:
            with compiling(but=(OSError,)):
                import tvm

                from llmopt.passes.compile_tvm import schedules, tuning

                tuning.tune(kernels, self._records, tvm.target.Target(self.lowered.target), budget_s, on_kernel)
                found = {name: self._records.find(schedules.name_of(f)) for name, f in kernels.items()}
        except (OSError, RefusedRecordsError) as error:
            self._refuse(f"records cannot be kept: {error}")
            return
        faster = {name: r.default_us / r.us for name, r in found.items() if r is not None and r.schedule is not None}
        self.facts["records"] = str(self._records.file)
        self.facts["tuning"] = {
            "seconds": time.perf_counter() - started,
            "budget_s": budget_s,
            "kernels": len(kernels),
            "done": sum(record is not None and record.done for record in found.values()),
            "tried": sum(record.tried for record in found.values() if record is not None),
            "faster": faster,
        }

    def _refuse(self, why: str) -> None:
        if self._given:
            raise PassError(f"compile_tvm: {why}")
        self.facts["refused"] = why
