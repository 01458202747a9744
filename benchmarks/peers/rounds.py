"""Interleaved rounds: every contender takes its turn at every job of every round, in an order that rotates.

Only one contender is awake at a time; when another one's turn begins, a short request that is not timed comes first.
The machine's ceilings are measured at the start of each round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import Timed
from benchmarks.peers.jobs import Job, Times
from benchmarks.peers.lock import Lock
from benchmarks.peers.worker import ContenderError

_START_S, _WARM_UP_S = 3600.0, 900.0  # starting includes compiling
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    jobs: tuple[Job, ...]  # small ones first
    rounds: int = 5
    cap_s: float = 60.0  # a job that takes longer is skipped
    one_at_a_time: bool = False  # models too large to be in memory together
    lock: Path | None = None  # held while something is timed


@dataclass(slots=True)
class Outcome:
    """What came out, by contender and cell."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # tokens a second, one a round
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)  # the reason
    info: dict[str, dict[str, Any]] = field(default_factory=dict)  # what contenders say of themselves
    rounds: int = 0  # done


class Rounds:
    """One run.

    Args:
        field: contenders by name, made ready.
        plan: jobs and rounds.
        every_round: called once a round, with the lock held (ceilings); before every turn where those take minutes.
        say: progress.
        on_round: called after each round with what there is by then.
    """

    def __init__(
        self, field: Mapping[str, Timed], plan: Plan, every_round: Callable[[], object], say: Callable[[str], None],
        *, on_round: Callable[[Outcome], object] = lambda outcome: None,
    ) -> None:  # fmt: skip
        self.field, self.plan, self.every_round, self.say = dict(field), plan, every_round, say
        self.on_round, self.lock = on_round, Lock(plan.lock)
        self._last = ""  # whose turn it was
        self.outcome = Outcome()

    def run(self) -> Outcome:
        try:
            # what is loaded anew for every turn is warmed then
            for name in () if self.plan.one_at_a_time else self.field:
                self._warm_up(name)
            for done in range(self.plan.rounds):
                self.say(f"round {done + 1} of {self.plan.rounds}")
                measured = False
                for name, job in self._turns(done):
                    if not measured or (self.plan.one_at_a_time and job == self.plan.jobs[0]):
                        self.lock.hold()
                        self.every_round()
                        measured = True
                    self._turn(name, job)
                self.outcome.rounds = done + 1
                self.on_round(self.outcome)
        finally:
            self.lock.release()
            for timed in self.field.values():
                timed.close()
        return self.outcome

    def _turns(self, done: int) -> Iterator[tuple[str, Job]]:
        names, jobs = list(self.field), self.plan.jobs
        turned = [names[(i + done) % len(names)] for i in range(len(names))] if names else []
        if not self.plan.one_at_a_time:
            yield from ((name, job) for job in jobs for name in turned)
            return
        for name in turned:
            yield from ((name, job) for job in jobs)
            self.field[name].close()

    def _warm_up(self, name: str) -> None:
        """Start it and run every job once, untimed; find out which ones would take too long."""
        self.say(f"{name}: starting")
        known: list[tuple[Job, Times]] = []
        # twice the first: what it compiles on the way would foretell nothing
        for job in (self.plan.jobs[0], *self.plan.jobs):
            least = min((job.at_least_s(other, times) for other, times in known), default=0.0)
            if least > self.plan.cap_s:
                self._skip(name, job, f"would take over {least:.0f} s, the cap is {self.plan.cap_s:.0f} s")
                continue
            short = dataclasses.replace(job, tokens=min(job.tokens, _WARM_UP_TOKENS))
            try:
                self._wake(name)
                times = self._timed(name, short)
                if job.at_least_s(short, times) > self.plan.cap_s:
                    times = self._timed(name, short)
            except ContenderError as error:
                self._skip(name, job, str(error))
                if name not in self.outcome.info:
                    return
                continue
            known.append((short, times))
            took = job.at_least_s(short, times)
            if took > self.plan.cap_s:
                self._skip(name, job, f"takes {took:.0f} s, the cap is {self.plan.cap_s:.0f} s")

    def _timed(self, name: str, job: Job, timeout_s: float = _WARM_UP_S) -> Times:
        self.lock.hold()
        return self.field[name].run(job, timeout_s)

    def _wake(self, name: str) -> None:
        """Start it if it is not running. Loading and compiling are not timed: others may have the machine meanwhile."""
        timed = self.field[name]
        if not timed.is_running:
            self.lock.release()
            self.outcome.info[name] = timed.start(_START_S)

    def _turn(self, name: str, job: Job) -> None:
        if job.cells[0] in self.outcome.skipped.get(name, {}):
            return
        try:
            # those that are loaded for every turn warm up, and a host may have taken the memory of one that lay idle
            is_cold = name != self._last or not self.field[name].is_running
            self._wake(name)
            if is_cold and not self.field[name].warms_itself:
                self._timed(name, dataclasses.replace(self.plan.jobs[0], tokens=_WARM_UP_TOKENS))
            self._last = name
            times = self._timed(name, job, 3 * self.plan.cap_s + 60)
        except ContenderError as error:
            self._skip(name, job, str(error))
            return
        rates = job.rates(times)
        self.say(f"  {name}: " + ", ".join(f"{cell} {rate:.1f} tok/s" for cell, rate in rates.items()))
        for cell, rate in rates.items():
            self.outcome.samples.setdefault(name, {}).setdefault(cell, []).append(rate)

    def _skip(self, name: str, job: Job, reason: str) -> None:
        # one that does not even start will do no other job either
        cells = job.cells if name in self.outcome.info else [cell for each in self.plan.jobs for cell in each.cells]
        self.say(f"  {name}: {', '.join(cells)} skipped: {reason}")
        for cell in cells:
            self.outcome.skipped.setdefault(name, {})[cell] = reason
