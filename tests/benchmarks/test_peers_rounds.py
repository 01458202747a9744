"""Rounds with contenders that only pretend: order, caps, failures, and the lock."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.jobs import Job, Times, parse
from benchmarks.peers.rounds import Outcome, Plan, Rounds
from benchmarks.peers.worker import ContenderError

JOBS = parse("128,512", tokens=32)


class Fake:
    """Takes ``prefill_s`` for each 128 tokens of prompt and ``token_s`` a token, and writes down its turns."""

    warms_itself = False

    def __init__(self, name: str, log: list[str], prefill_s: float = 0.5, token_s: float = 0.01) -> None:
        self.name, self.log, self.prefill_s, self.token_s = name, log, prefill_s, token_s
        self.is_running, self.starts, self.fails_from = False, 0, 10**9
        self.runs = 0

    def start(self, timeout_s: float) -> dict[str, Any]:
        self.is_running, self.starts = True, self.starts + 1
        return {"name": self.name}

    def run(self, job: Job, timeout_s: float) -> Times:
        assert self.is_running
        self.runs += 1
        if self.runs >= self.fails_from:
            self.is_running = False
            raise ContenderError("it broke")
        self.log.append(f"{self.name}@{job.depth}+{job.tokens}")
        return Times(self.prefill_s * job.depth / 128, self.token_s * job.tokens)

    def close(self) -> None:
        self.is_running = False


def run(fakes: list[Fake], every_round: Any = lambda: None, **plan: Any) -> Outcome:
    settings = {"jobs": JOBS, "rounds": 3, "cap_s": 60.0} | plan
    return Rounds({f.name: f for f in fakes}, Plan(**settings), every_round, lambda text: None).run()


def timed(log: list[str]) -> list[str]:
    """Without the warm-up, which decodes fewer tokens."""
    return [entry for entry in log if entry.endswith("+32")]


def test_contenders_take_turns_within_a_cell_and_the_order_rotates() -> None:
    log: list[str] = []
    out = run([Fake("a", log), Fake("b", log)], lambda: log.append("ceilings+32"), rounds=2)
    assert timed(log) == [
        "ceilings+32", "a@128+32", "b@128+32", "a@512+32", "b@512+32",
        "ceilings+32", "b@128+32", "a@128+32", "b@512+32", "a@512+32",
    ]  # fmt: skip
    assert out.samples["a"] == {
        "prefill 128": [256.0, 256.0], "decode 128": [pytest.approx(100.0)] * 2,
        "prefill 512": [256.0, 256.0], "decode 512": [pytest.approx(100.0)] * 2,
    }  # fmt: skip
    assert out.skipped == {}
    assert out.info == {"a": {"name": "a"}, "b": {"name": "b"}}


def test_a_job_that_would_take_too_long_is_not_even_tried() -> None:
    log: list[str] = []
    out = run([Fake("slow", log, prefill_s=20.0)])
    assert not [entry for entry in log if "@512" in entry]
    assert out.skipped["slow"]["prefill 512"] == "would take over 80 s, the cap is 60 s"
    assert set(out.skipped["slow"]) == {"prefill 512", "decode 512"}
    assert len(out.samples["slow"]["prefill 128"]) == 3


def test_a_first_run_that_compiles_foretells_nothing() -> None:
    class Compiles(Fake):
        def run(self, job: Job, timeout_s: float) -> Times:
            times = super().run(job, timeout_s)
            return Times(50.0, 50.0) if self.runs == 1 else times

    out = run([Compiles("compiled", [])])
    assert out.skipped == {}
    assert len(out.samples["compiled"]["decode 512"]) == 3


def test_a_cell_that_breaks_is_skipped_with_its_reason_and_the_rest_goes_on() -> None:
    log: list[str] = []
    breaks = Fake("breaks", log)
    breaks.fails_from = 7  # three to warm up, then 128 and 512 with a request before each; 512 breaks once
    breaks_once = type("Once", (Fake,), {})("other", log)
    original = breaks.run

    def once(job: Job, timeout_s: float) -> Times:
        try:
            return original(job, timeout_s)
        finally:
            if breaks.runs >= 7:
                breaks.fails_from = 10**9

    breaks.run = once  # type: ignore[method-assign]
    out = run([breaks, breaks_once])
    assert out.skipped == {"breaks": {"prefill 512": "it broke", "decode 512": "it broke"}}
    assert len(out.samples["breaks"]["decode 128"]) == 3
    assert breaks.starts == 2
    assert len(out.samples["other"]["decode 512"]) == 3


def test_a_contender_that_does_not_start_is_skipped_whole() -> None:
    class Absent(Fake):
        def start(self, timeout_s: float) -> dict[str, Any]:
            raise ContenderError("there is none")

    out = run([Absent("absent", []), Fake("a", [])])
    assert set(out.skipped["absent"].values()) == {"there is none"}
    assert set(out.skipped["absent"]) == {"prefill 128", "decode 128", "prefill 512", "decode 512"}
    assert "absent" not in out.samples
    assert len(out.samples["a"]["decode 512"]) == 3


def test_one_at_a_time_keeps_one_model_in_memory() -> None:
    log: list[str] = []
    fakes = [Fake("a", log), Fake("b", log)]

    class Watched(Fake):
        def run(self, job: Job, timeout_s: float) -> Times:
            assert sum(f.is_running for f in fakes) == 1
            return super().run(job, timeout_s)

    fakes[:] = [Watched("a", log), Watched("b", log)]
    out = run(fakes, rounds=2, one_at_a_time=True)
    assert timed(log) == [
        "a@128+32", "a@512+32", "b@128+32", "b@512+32", "b@128+32", "b@512+32", "a@128+32", "a@512+32",
    ]  # fmt: skip
    assert [f.starts for f in fakes] == [2, 2]
    assert len(out.samples["a"]["decode 512"]) == 2


def test_one_that_lay_idle_is_warmed_before_its_turn() -> None:
    log: list[str] = []
    run([Fake("a", log), Fake("b", log)], rounds=1, jobs=JOBS[:1])
    assert log[-4:] == ["a@128+4", "a@128+32", "b@128+4", "b@128+32"]
    log.clear()
    run([Fake("a", log)], rounds=2, one_at_a_time=True)
    assert log == ["a@128+4", "a@128+32", "a@512+32"] * 2


def test_one_that_warms_itself_is_only_timed() -> None:
    class Warm(Fake):
        warms_itself = True

    log: list[str] = []
    warm = Warm("a", log)
    out = run([warm], rounds=2, one_at_a_time=True)
    assert log == ["a@128+32", "a@512+32"] * 2
    assert warm.starts == 2
    assert len(out.samples["a"]["decode 512"]) == 2


def test_everything_is_closed_whatever_happens() -> None:
    fakes = [Fake("a", []), Fake("b", [])]

    def breaks() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fakes, breaks)
    assert not any(fake.is_running for fake in fakes)


def test_what_there_is_after_each_round_is_handed_out() -> None:
    seen: list[tuple[int, int]] = []
    rounds = Rounds(
        {"a": Fake("a", [])}, Plan(JOBS, rounds=3), lambda: None, lambda text: None,
        on_round=lambda out: seen.append((out.rounds, len(out.samples["a"]["decode 512"]))),
    )  # fmt: skip
    rounds.run()
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_the_lock_is_held_while_something_is_timed_and_not_between(tmp_path: Path) -> None:
    lock, held = tmp_path / "lock", []

    def is_free() -> bool:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    class Looks(Fake):
        def start(self, timeout_s: float) -> dict[str, Any]:
            assert is_free()
            return super().start(timeout_s)

        def run(self, job: Job, timeout_s: float) -> Times:
            held.append(not is_free())
            return super().run(job, timeout_s)

    run([Looks("a", [])], lambda: held.append(not is_free()), lock=lock)
    assert held
    assert all(held)
    assert is_free()
