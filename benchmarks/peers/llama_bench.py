"""ik_llama.cpp through its own llama-bench and llama-batched-bench, where somebody has built them.

They load the model for every call and warm up by themselves; only what they report is counted, not the loading. Of a
large model all jobs of a turn come from one call, for one loading.
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
_KEYS = ("build_commit", "build_number", "model_type", "model_size", "model_n_params")
# repacked weights, flash attention, and of MoE models: fused experts, latent attention absorbed for few tokens, and what
# else makes it faster there
_FLAGS = ("-rtr", 1, "-fa", 1)
_MOE_FLAGS = ("-fmoe", 1, "-mla", 3, "-muge", 1, "-mqkv", 1, "-ger", 1, "-rcache", 1, "-thp", 1)
# | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |
_ROW = re.compile(r"^\|(?:\s*[\d.]+\s*\|){10}\s*$", re.MULTILINE)


class LlamaBench:
    """Behaves like a ``Worker``, without a process between the jobs.

    Args:
        program: path of llama-bench; llama-batched-bench is looked for beside it.
        model: the GGUF file.
        threads: for computing.
        together: jobs of one sequence that are measured in one call, when the first of them is asked for.
    """

    def __init__(self, program: Path, model: Path, threads: int, together: tuple[Job, ...] = ()) -> None:
        self.program, self.model, self.threads = program.resolve(), model.resolve(), threads
        self.is_running, self.warms_itself = False, bool(together)
        self._together = tuple(job for job in together if job.sequences == 1)
        self._measured: dict[Job, Times] = {}
        self._info: dict[str, Any] = {}

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Returns what it says of itself; with jobs together the first of them fills that in, for one loading."""
        if not self._info and not self._together:
            self._bench((Job(8, 1),), timeout_s)
        self.is_running = True
        return self._info

    def run(self, job: Job, timeout_s: float) -> Times:
        if job.sequences > 1:
            return self._batched(job, timeout_s)
        if job not in self._measured:
            jobs = self._together if job in self._together else (job,)
            # rows with generated tokens are of those alone: their prompt is read before the clock starts
            seconds = {(row["n_prompt"], row["n_gen"]): row["avg_ns"] * 1e-9 for row in self._bench(jobs, timeout_s)}
            self._measured = {j: Times(seconds[j.depth, 0], seconds[j.depth, j.tokens]) for j in jobs}
        return self._measured.pop(job)

    def close(self) -> None:
        self.is_running = False
        self._measured.clear()

    def _bench(self, jobs: tuple[Job, ...], timeout_s: float) -> list[dict[str, Any]]:
        wanted: list[object] = ["-p", ",".join(str(job.depth) for job in jobs), "-n", 0]
        for job in jobs:
            wanted += ["-gp", f"{job.depth},{job.tokens}"]
        flags = (*_FLAGS, *_MOE_FLAGS) if self._together else _FLAGS
        out, _ = self._call(
            [self.program, "-m", self.model, "-t", self.threads, *wanted, "-r", 1, *flags, "-o", "json"], timeout_s
        )
        try:
            rows: list[dict[str, Any]] = json.loads(out[out.index("[") :])
        except ValueError:
            raise ContenderError(f"llama-bench: expected JSON, got {out[:200]!r}") from None
        said = {key: rows[0][key] for key in _KEYS if key in rows[0]}
        self._info.update({"program": self.program.name, "flags": " ".join(map(str, flags)), **said})
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
