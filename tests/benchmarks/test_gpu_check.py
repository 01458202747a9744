"""The GPU check, without a GPU: small cases, and what it does with a wrong answer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import ops
from benchmarks.gpu_check.answers import FAMILY_COSINE
from benchmarks.gpu_check.ops import CPU_ONLY, OpCase, Outcome, cases
from llmopt.ops import SPECS

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is not 1")


def test_everything_is_right_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--interpret", *files])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["steps"]["ops"]) == set(SPECS) - CPU_ONLY
    assert found["steps"]["families"]["qwen3"] > FAMILY_COSINE
    assert set(found["steps"]["passes"]) == {"ernie4_5, swap_flash_attention", "ernie4_5, fuse_kernels"}
    assert all(float(least) > FAMILY_COSINE for least in found["steps"]["passes"].values())
    assert found["steps"]["gptq"] == 2
    assert found["steps"]["ahead"] == 5
    assert found["left_out"] == []
    assert "Right: " in (tmp_path / "a.md").read_text()
    assert "Least cosine of int4 logits" in capsys.readouterr().out


def test_a_checkout_that_is_not_installed_will_do() -> None:
    """As on a GPU machine: no llmopt among the packages, nor tvm_ffi."""
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{getattr(f, '__module__', '')} {f!r}".lower()]
sys.path[:] = [p for p in sys.path if "editable" not in p]
sys.modules["tvm_ffi"] = None
try:
    import llmopt.ops
except ImportError:
    pass
else:
    sys.exit("llmopt is installed in another way")
from benchmarks.gpu_check import __main__ as gpu_check
from llmopt import native, ops
ops.SPECS = {"embed": ops.SPECS["embed"]}
print(native.available(), gpu_check.check_ops(gpu_check.Run(interpret=True, quick=False, seconds=100))["embed"] > 3)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.stdout.split() == ["False", "True"], ran.stderr


def test_it_stops_at_the_first_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["embed"]
    wrong = dataclasses.replace(spec, run=lambda **inputs: spec.run(**inputs) + 1)
    monkeypatch.setattr("llmopt.ops.SPECS", {"embed": wrong, "never": None})
    run = gpu_check.Run(interpret=True, quick=False, seconds=100)
    assert not gpu_check.check(run)
    assert run.found["wrong"].startswith("embed, ")
    assert run.found["steps"] == {}
    assert "**Wrong: embed" in "\n".join(gpu_check.table(run.found))


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> gpu_check.Run:
    """A run as on a GPU, its processes threads of this one; no answer is checked but what a test puts in."""

    class Context:
        Pool = ThreadPool

    monkeypatch.setattr(ops, "get_context", lambda kind: Context)
    return gpu_check.Run(interpret=False, quick=True, seconds=100)


def test_a_kernel_that_fails_is_written_down_and_the_others_go_on(
    gpu_run: gpu_check.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(case: OpCase, run: gpu_check.Run) -> Outcome:
        fails = case.op == "embed" and case.dtype == torch.bfloat16
        return Outcome(case, f"{case}", "", "OutOfResources: shared memory" if fails else "")

    monkeypatch.setattr(ops, "checked", one)
    right = gpu_check.check_ops(gpu_run)
    assert set(right) == set(SPECS) - CPU_ONLY
    every = list(cases(gpu_run))
    failed = [case for case in every if case.op == "embed" and case.dtype == torch.bfloat16]
    assert sum(right.values()) == len(every) - len(failed)
    assert len(gpu_run.found["failed"]) == len(failed) > 0


def test_a_wrong_answer_of_a_process_ends_the_check(gpu_run: gpu_check.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "checked", lambda case, run: Outcome(case, "", "moe is wrong" * (case.op == "moe"), ""))
    assert not gpu_check.check(gpu_run)
    assert gpu_run.found["wrong"] == "moe is wrong"
    assert gpu_run.found["steps"] == {}


def test_cases_that_no_time_is_left_for_are_counted(gpu_run: gpu_check.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_run.end = time.perf_counter() + 0.2
    monkeypatch.setattr(ops, "checked", lambda case, run: time.sleep(0.05) or Outcome(case, "", "", ""))
    right = sum(gpu_check.check_ops(gpu_run).values())
    (said,) = gpu_run.found["left_out"]
    assert said == f"{len(list(cases(gpu_run))) - right} cases of ops"


def test_what_is_found_is_written_after_every_step() -> None:
    seen: list[list[str]] = []
    run = gpu_check.Run(interpret=True, quick=False, seconds=9, written=lambda found: seen.append(list(found["steps"])))
    for name in ("ops", "gptq"):
        run.step(name, 0, lambda run: 1)
    assert seen == [["ops"], ["ops", "gptq"]]


def test_answers_that_were_not_checked_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_ops", "check_gptq", "check_families", "check_ahead"):
        monkeypatch.setattr(gpu_check, name, lambda run: {})
    run = gpu_check.Run(interpret=False, quick=True, seconds=15)
    monkeypatch.setattr(gpu_check, "check_passes", lambda run: pytest.fail("there is no time for it"))
    assert not gpu_check.check(run)
    assert "passes" in run.found["left_out"]


def test_steps_without_time_are_named() -> None:
    run = gpu_check.Run(interpret=True, quick=False, seconds=5)
    run.step("ceilings", 20, lambda run: {})
    assert run.found["left_out"] == ["ceilings"]
    assert list(gpu_check.table(run.found)) == ["\nNo time was left for: ceilings"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match="no CUDA device; --interpret runs the small cases"):
        gpu_check.main()
