"""Tuning: schedules of the generated kernels, drawn, compiled and timed within a time budget; what beats the default is kept.

Kernels are called for one token on one thread, as a step calls them. A kernel's record is written when its share of the
budget is over, or when it is interrupted, and the next search goes on where this one ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from llmopt.measure import stats
from llmopt.passes.compile_tvm import schedules
from llmopt.passes.compile_tvm.records import Record, Records

# draws of nothing new, one after another, before a kernel counts as done
_IN_VAIN = 16
_CALLS, _REPEAT, _ROUNDS = 200, 5, 21
# a schedule that LLVM or TVM cannot compile is no candidate
_CANNOT = (RuntimeError, ValueError, TypeError, schedules.RefusedScheduleError)


@dataclass(slots=True)
class Candidate:
    """A schedule, compiled."""

    schedule: Any
    module: Any

    @staticmethod
    def of(schedule: Any, target: Any) -> Candidate:
        """Compile a schedule."""
        function = schedules.function(schedule).with_attr("global_symbol", "main")
        return Candidate(schedule, tvm.compile(tvm.IRModule({"main": function}), target=target).jit())

    def us(self, arguments: list[Any], repeat: int = 1) -> float:
        """Microseconds a call: the fastest of ``repeat`` averages."""
        timed = self.module.time_evaluator("main", tvm.cpu(), number=_CALLS, repeat=repeat)
        fastest: float = min(timed(*arguments).results)
        return fastest * 1e6


def tune(
    kernels: dict[str, Any], records: Records, target: Any, budget_s: float, on_kernel: Callable[[str, int], None]
) -> None:
    """Search for schedules until the time is over; what is found is in ``records``.

    Args:
        kernels: PrimFuncs by name.
        records: those that are done there are not tuned again.
        target: TVM's.
        budget_s: seconds for all of them; a kernel that is done leaves its share to the others. The first gets one draw.
        on_kernel: told each kernel's name, and how many are finished.

    Raises:
        OSError: records cannot be written.
    """
    ends = time.perf_counter() + budget_s
    left = [(name, f, schedules.name_of(f)) for name, f in kernels.items()]
    left = [item for item in left if not getattr(records.find(item[2]), "done", False)]
    for finished, (name, kernel, key) in enumerate(left):
        now = time.perf_counter()
        if now >= ends and finished:
            return
        on_kernel(name, finished + len(kernels) - len(left))
        search = _Search(name, kernel, target, records.find(key))
        try:
            search.run(now + (ends - now) / (len(left) - finished))
        finally:  # an interrupt too leaves what was found
            records.add(key, search.record())


class _Search:
    """The search for one kernel's schedule."""

    def __init__(self, name: str, kernel: Any, target: Any, before: Record | None) -> None:
        self._name, self._kernel, self._target = name, kernel, target
        self._arguments = one_token(kernel)
        self._default = Candidate.of(schedules.default(kernel), target)
        self._expected = self._result(self._default)
        self._best = self._default
        self._before = before or Record(name, 0, 0, False, 0.0, 0.0, None)
        if self._before.schedule is not None:
            with contextlib.suppress(*_CANNOT):
                self._consider(schedules.replayed(kernel, self._before.schedule))
        self._seen = {schedules.name_of(schedules.function(c.schedule)) for c in (self._default, self._best)}
        self._seeds, self._tried, self._done = self._before.seeds, self._before.tried, False

    def run(self, ends: float) -> None:
        """Until that time by the clock, or until nothing new is drawn."""
        vain = 0
        while vain < _IN_VAIN and (time.perf_counter() < ends or self._seeds == self._before.seeds):
            self._seeds += 1
            vain += 1
            with contextlib.suppress(*_CANNOT):
                schedule = schedules.drawn(self._kernel, self._seeds)
                drawn = schedules.name_of(schedules.function(schedule))
                if drawn not in self._seen:
                    self._seen.add(drawn)
                    self._consider(schedule)
                    vain, self._tried = 0, self._tried + 1
        self._done = vain == _IN_VAIN

    def record(self) -> Record:
        """The fastest beside the default, in turns."""
        rounds = [(self._default.us(self._arguments), self._best.us(self._arguments)) for _ in range(_ROUNDS)]
        default_us, us = zip(*rounds, strict=True)
        faster = self._best is not self._default and stats.ratio(default_us, us).low > 1
        return dataclasses.replace(
            self._before, name=self._name, tried=self._tried, seeds=self._seeds, done=self._done,
            default_us=statistics.median(default_us), us=statistics.median(us if faster else default_us),
            schedule=schedules.said(self._best.schedule) if faster else None,
        )  # fmt: skip

    def _consider(self, schedule: Any) -> None:
        candidate = Candidate.of(schedule, self._target)
        pairs = zip(self._expected, self._result(candidate), strict=True)
        alike = all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
        if alike and candidate.us(self._arguments, repeat=_REPEAT) < self._best.us(self._arguments, repeat=_REPEAT):
            self._best = candidate

    def _result(self, candidate: Candidate) -> list[np.ndarray[Any, Any]]:
        """Every argument after a call: kernels write to some of them."""
        arguments = [tvm.runtime.tensor(a.numpy()) for a in self._arguments]
        candidate.module["main"](*arguments)
        return [a.numpy().astype(np.float64) for a in arguments]


def one_token(kernel: Any) -> list[Any]:
    """Tensors for a kernel, every symbolic size 1: one token, of one sequence, over one slot."""
    draw = np.random.default_rng(0)
    made = []
    for parameter in kernel.params:
        shape = [1 if isinstance(size, tvm.tirx.Var) else int(size) for size in parameter.shape]
        values = np.zeros(shape) if "int" in str(parameter.dtype) else draw.standard_normal(shape)
        made.append(tvm.runtime.tensor(values.astype(_numpy_dtype(str(parameter.dtype)))))
    return made


def _numpy_dtype(dtype: str) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
