"""Jobs and cells of the peer benchmark, and what llama-bench prints."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import jobs
from benchmarks.peers.jobs import Job, Times
from benchmarks.peers.llama_bench import LlamaBench, parse_batched
from benchmarks.peers.worker import ContenderError


def test_jobs_come_small_first_and_once() -> None:
    assert jobs.parse("4096, 128,8x128,128", tokens=32) == (Job(128, 32), Job(128, 16, 8), Job(4096, 32))


@pytest.mark.parametrize("words", ["", "x", "8x", "0", "128,,512", "-1", "128x8x2"])
def test_what_is_no_cell_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="expected DEPTH or SEQUENCESxDEPTH"):
        jobs.parse(words)


def test_rates_are_tokens_of_all_sequences() -> None:
    assert Job(128, 32).rates(Times(0.5, 2.0)) == {"prefill 128": 256.0, "decode 128": 16.0}
    assert Job(128, 16, 8).rates(Times(0.5, 2.0)) == {"decode 8x128": 64.0}


def test_a_larger_job_is_foretold_from_a_smaller_one() -> None:
    assert Job(512, 32).at_least_s(Job(128, 4), Times(1.0, 0.5)) == pytest.approx(4 * 1.0 + 8 * 0.5)
    assert Job(128, 4, 8).at_least_s(Job(128, 4), Times(1.0, 0.5)) == pytest.approx(8 * 1.0 + 0.5)


TABLE = """
main: n_kv_max = 4096, n_batch = 2048
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   128 |     16 |    8 |   1152 |    2.048 |   500.00 |    1.280 |   100.00 |    3.328 |   346.15 |

"""


def test_the_table_of_llama_batched_bench_is_read() -> None:
    assert parse_batched(TABLE) == Times(2.048, 1.28)
    with pytest.raises(ContenderError, match="expected a table"):
        parse_batched("nothing fits into memory")


def program(path: Path, out: str, code: int = 0, stream: str = "stdout") -> Path:
    """A program that writes its arguments beside itself and prints ``out``."""
    path.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\npathlib.Path(__file__ + '.args').write_text(' '.join(sys.argv[1:]))\n"
        f"print({out!r}, file=sys.{stream})\nprint('no such file', file=sys.stderr)\nsys.exit({code})\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def row(n_prompt: int, n_gen: int, ns: int) -> dict[str, Any]:
    return {"build_commit": "abc", "n_prompt": n_prompt, "n_gen": n_gen, "avg_ns": ns, "avg_ts": 1.0}


def test_llama_bench_is_asked_for_prompt_and_generation_alone(tmp_path: Path) -> None:
    out = json.dumps([row(512, 0, 2_000_000_000), row(512, 32, 500_000_000)])
    bench = LlamaBench(program(tmp_path / "llama-bench", "some words first\n" + out), tmp_path / "m.gguf", 3)
    assert bench.run(Job(512, 32), 30) == Times(2.0, 0.5)
    asked = (tmp_path / "llama-bench.args").read_text()
    assert "-t 3 -p 512 -n 0 -gp 512,32 -r 1" in asked
    assert not bench.is_running
    assert bench.start(30)["build_commit"] == "abc"
    assert bench.is_running


def test_jobs_of_a_turn_come_from_one_call(tmp_path: Path) -> None:
    rows = [row(128, 0, 10**9), row(512, 0, 2 * 10**9), row(128, 4, 3 * 10**9), row(512, 4, 4 * 10**9)]
    jobs = (Job(128, 4), Job(512, 4))
    made = program(tmp_path / "llama-bench", json.dumps(rows))
    bench = LlamaBench(made, tmp_path / "m.gguf", 2, jobs)
    assert bench.warms_itself
    assert bench.run(jobs[0], 30) == Times(1.0, 3.0)
    asked = tmp_path / "llama-bench.args"
    assert "-p 128,512 -n 0 -gp 128,4 -gp 512,4" in asked.read_text()
    asked.unlink()
    assert bench.run(jobs[1], 30) == Times(2.0, 4.0)
    assert not asked.exists()
    bench.close()
    bench.run(jobs[1], 30)
    assert asked.exists()


def test_llama_batched_bench_is_looked_for_beside_it(tmp_path: Path) -> None:
    bench = LlamaBench(program(tmp_path / "llama-bench", "[]"), tmp_path / "m.gguf", 2)
    with pytest.raises(ContenderError, match="no llama-batched-bench beside"):
        bench.run(Job(128, 16, 8), 30)
    for stream in ("stdout", "stderr"):
        program(tmp_path / "llama-batched-bench", TABLE, stream=stream)
        assert bench.run(Job(128, 16, 8), 30) == Times(2.048, 1.28)


def test_what_the_programs_leave_lying_about_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(tmp_path / "llama-bench", json.dumps([row(16, 0, 1), row(16, 4, 1)]))
    made.write_text(made.read_text().replace("import sys, pathlib", "import sys, pathlib; open('llama.log', 'w')"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    LlamaBench(made, tmp_path / "m.gguf", 2).run(Job(16, 4), 30)
    assert not list(folder.iterdir())


def test_what_llama_bench_says_last_is_the_reason(tmp_path: Path) -> None:
    bench = LlamaBench(program(tmp_path / "llama-bench", "", code=1), tmp_path / "m.gguf", 2)
    with pytest.raises(ContenderError, match="llama-bench failed: no such file"):
        bench.start(30)
