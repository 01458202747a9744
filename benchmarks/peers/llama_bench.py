"""ik_llama.cpp through its own llama-bench and llama-batched-bench, where somebody has built them.

They load the model for every call and warm up by themselves; only what they report is counted, not the loading.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.jobs import Job, Times
from benchmarks.peers.worker import ContenderError

_BATCHED = "llama-batched-bench"
# | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |
_ROW = re.compile(r"^\|(?:\s*[\d.]+\s*\|){10}\s*$", re.MULTILINE)


class LlamaBench:
    """Behaves like a ``Worker``, without a process between the jobs.

    Args:
        program: path of llama-bench; llama-batched-bench is looked for beside it.
        model: the GGUF file.
        threads: for computing.
    """

    def __init__(self, program: Path, model: Path, threads: int) -> None:
        self.program, self.model, self.threads = program.resolve(), model.resolve(), threads
        self.build: dict[str, Any] = {}
        self.is_running = False

    def start(self, timeout_s: float) -> dict[str, Any]:
        rows = self._bench(Job(8, 1), timeout_s)
        self.is_running = True
        keys = ("build_commit", "build_number", "model_type", "model_size", "model_n_params")
        return {"program": self.program.name, **{key: rows[0][key] for key in keys if key in rows[0]}}

    def run(self, job: Job, timeout_s: float) -> Times:
        if job.sequences > 1:
            return self._batched(job, timeout_s)
        seconds = {row["n_gen"]: row["avg_ns"] * 1e-9 for row in self._bench(job, timeout_s)}
        # a row with generated tokens is of those alone: its prompt is read before the clock starts
        return Times(seconds[0], seconds[job.tokens])

    def close(self) -> None:
        self.is_running = False

    def _bench(self, job: Job, timeout_s: float) -> list[dict[str, Any]]:
        out, _ = self._call(
            [self.program, "-m", self.model, "-t", self.threads, "-p", job.depth, "-n", 0,
             "-gp", f"{job.depth},{job.tokens}", "-r", 1, "-rtr", 1, "-fa", 1, "-o", "json"], timeout_s,
        )  # fmt: skip
        try:
            rows: list[dict[str, Any]] = json.loads(out[out.index("[") :])
        except ValueError:
            raise ContenderError(f"llama-bench: expected JSON, got {out[:200]!r}") from None
        return rows

    def _batched(self, job: Job, timeout_s: float) -> Times:
        program = self.program.with_name(_BATCHED)
        if not program.is_file():
            raise ContenderError(f"there is no {_BATCHED} beside {self.program.name}")
        context = max(4096, job.sequences * (job.depth + job.tokens))
        out = self._call(
            [program, "-m", self.model, "-t", self.threads, "-c", context, "-npp", job.depth, "-ntg", job.tokens,
             "-npl", job.sequences, "-rtr", "-fa", "on"], timeout_s,
        )  # fmt: skip
        return parse_batched("\n".join(out))

    def _call(self, command: list[Any], timeout_s: float) -> tuple[str, str]:
        words = [str(word) for word in command]
        try:
            # they leave a log where they run
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise ContenderError(f"no answer within {timeout_s:.0f} s") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise ContenderError(f"{Path(words[0]).name} failed: {said[-1] if said else done.returncode}"[:300])
        # the table of llama-batched-bench is on stderr in some builds
        return done.stdout, done.stderr


def parse_batched(out: str) -> Times:
    """Times from the table that llama-batched-bench prints, its last row.

    Raises:
        ContenderError: there is no such row.
    """
    rows = _ROW.findall(out)
    if not rows:
        raise ContenderError(f"{_BATCHED}: expected a table, got {out[-200:]!r}")
    values = [float(cell) for cell in rows[-1].strip().strip("|").split("|")]
    return Times(values[4], values[6])
