"""The driver's end: one process per contender, its model loaded once, stopped whenever it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.jobs import Job, Times

_QUIT_S = 10.0


class ContenderError(RuntimeError):
    """A contender did not start, failed or took too long; the message is what the table says."""


class Worker:
    """A process that speaks the protocol of ``workers/serve.py``.

    It has a process group of its own, which is stopped (SIGSTOP) between its turns: thread pools that spin for a while
    after their work, and compilers in the background, then cost the next contender nothing. It stays in the driver's
    session: Linux may schedule by session (autogroup), and then the driver's niceness would not be the worker's.

    Args:
        command: what to run.
        environment: its environment variables.
        folder: its working directory.
        log: where its stderr goes.
    """

    warms_itself = False

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
        self.command, self.environment, self.folder, self.log = list(command), dict(environment), folder, log
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Start it and wait until its model is loaded. Returns what it says of itself."""
        self._unread = b""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=self.folder,
                env=self.environment, preexec_fn=os.setpgrp,
            )  # fmt: skip
        info: dict[str, Any] = self._answer(timeout_s)["ready"]
        self._signal(signal.SIGSTOP)
        return info

    def run(self, job: Job, timeout_s: float) -> Times:
        """Time one job. The worker sleeps before and after."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        asked = {"depth": job.depth, "tokens": job.tokens, "sequences": job.sequences}
        with contextlib.suppress(BrokenPipeError):  # it has died: _answer says of what
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer(timeout_s)
        self._signal(signal.SIGSTOP)
        return Times(answer["prefill_s"], answer["decode_s"])

    def close(self) -> None:
        """End it, kindly first."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):
            os.killpg(process.pid, signal.SIGCONT)
            process.stdin.write(b'{"quit": true}\n')
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_QUIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, until - time.monotonic())):
                    self.close()
                    raise ContenderError(f"no answer within {timeout_s:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    self.close()
                    raise ContenderError(self._last_words())
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        """The end of its stderr: the last line of a traceback names the error."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        said = [line for line in lines if line]
        return said[-1][:300] if said else "ended without a word"
