"""The protocol between the driver and its workers, with a worker that only pretends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers.jobs import Job, Times
from benchmarks.peers.worker import ContenderError, Worker
from benchmarks.peers.workers import serve

ROOT = Path(__file__).parents[2]
FAKE = """
import os, subprocess, sys, time
from benchmarks.peers.workers import serve

class Engine:
    def info(self):
        print("a library that prints")
        return {"pid": os.getpid()}

    def run(self, depth, tokens, sequences):
        os.write(1, b"and one that writes to the descriptor\\n")
        if depth == 13:
            raise RuntimeError("cannot do 13")
        if depth == 99:
            time.sleep(600)
        return depth * 1e-3, tokens * sequences * 1e-3

serve.die_with_parent()
serve.serve(Engine(), serve.private_stdout())
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = Worker([sys.executable, str(script)], {**os.environ, "PYTHONPATH": str(ROOT)}, ROOT, tmp_path / "log")
    yield made
    made.close()


def state_of(pid: int) -> str:
    """R running, S sleeping, T stopped, Z dead; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def becomes(pid: int, states: tuple[str, ...]) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if state_of(pid) in states:
            return True
        time.sleep(0.01)
    return False


def test_a_worker_answers_and_what_libraries_print_does_not_reach_the_protocol(worker: Worker, tmp_path: Path) -> None:
    assert worker.start(30)["pid"] > 0
    assert worker.run(Job(128, 32), 30) == Times(0.128, 0.032)
    assert worker.run(Job(128, 16, 8), 30) == Times(0.128, 0.128)
    assert "a library that prints" in (tmp_path / "log").read_text()
    assert "writes to the descriptor" in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_is_stopped_between_its_turns(worker: Worker) -> None:
    pid = worker.start(30)["pid"]
    assert becomes(pid, ("T",))
    worker.run(Job(8, 1), 30)
    assert becomes(pid, ("T",))
    worker.close()
    assert becomes(pid, ("",))
    assert not worker.is_running


def test_the_reason_of_a_failure_is_the_last_line_of_the_traceback(worker: Worker) -> None:
    worker.start(30)
    with pytest.raises(ContenderError, match=r"^RuntimeError: cannot do 13$"):
        worker.run(Job(13, 1), 30)
    assert not worker.is_running
    worker.start(30)
    assert worker.run(Job(8, 1), 30) == Times(0.008, 0.001)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_takes_too_long_is_ended(worker: Worker) -> None:
    pid = worker.start(30)["pid"]
    with pytest.raises(ContenderError, match="no answer within"):
        worker.run(Job(99, 1), 0.3)
    assert becomes(pid, ("",))


def test_a_worker_that_does_not_start_says_why(tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", "import no_such_package"], dict(os.environ), ROOT, tmp_path / "log")
    with pytest.raises(ContenderError, match="ModuleNotFoundError: No module named 'no_such_package'"):
        worker.start(30)


def test_weights_are_summed_by_role_and_format() -> None:
    rows = serve.weight_rows([("linear", "Q4_0", 64, 36), ("linear", "Q4_0", 32, 18), ("head", "Q6_K", 256, 210)])
    assert rows == [
        {"role": "linear", "format": "Q4_0", "weights": 96, "bytes": 54},
        {"role": "head", "format": "Q6_K", "weights": 256, "bytes": 210},
    ]
