"""The GPU check, without a GPU: small cases, and what it does with a wrong answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.answers import CPU_ONLY, FAMILY_COSINE
from llmopt.ops import SPECS

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


def test_it_stops_at_the_first_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["embed"]
    wrong = dataclasses.replace(spec, run=lambda **inputs: spec.run(**inputs) + 1)
    monkeypatch.setattr("llmopt.ops.SPECS", {"embed": wrong, "never": None})
    run = gpu_check.Run(interpret=True, quick=False, seconds=100)
    assert not gpu_check.check(run)
    assert run.found["wrong"].startswith("embed, ")
    assert run.found["steps"] == {}
    assert "**Wrong: embed" in "\n".join(gpu_check.table(run.found))


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
