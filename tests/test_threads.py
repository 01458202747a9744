"""The number of threads: one for torch and the kernels, checked, and as many as the process may keep busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmopt
from llmopt import cli_doctor, native
from llmopt.errors import InputError
from llmopt.measure import environment
from llmopt.threads import usable_cores


def test_torch_and_the_kernels_follow(threads: Callable[[int], None]) -> None:
    for count in (3, 1, 2):
        assert llmopt.set_num_threads(count) == count
        assert llmopt.get_num_threads() == torch.get_num_threads() == count
        if native.available():
            assert int(native.library().ceiling_threads()) == count


@pytest.mark.parametrize("wrong", [0, -1, 1025, 2.0, "2", True], ids=repr)
def test_what_is_no_number_of_threads_is_refused(wrong: Any, threads: Callable[[int], None]) -> None:
    before = torch.get_num_threads()
    with pytest.raises(InputError, match=r"count: expected 1 to 1024, or None, got"):
        llmopt.set_num_threads(wrong)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("cores", "limit", "usable"), [(8, None, 8), (8, 2.5, 2), (8, 0.5, 1), (2, 16.0, 2)], ids=str)
def test_affinity_and_quota_both_count(
    cores: int, limit: float | None, usable: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "visible_cores", lambda: cores)
    monkeypatch.setattr(environment, "core_limit", lambda: limit)
    assert usable_cores() == usable
    assert llmopt.set_num_threads() == torch.get_num_threads() == usable
    assert cli_doctor._threads().status == "ok"
    llmopt.set_num_threads(usable + 1)
    check = cli_doctor._threads()
    assert check.status == "warn"
    assert f"set_num_threads() or OMP_NUM_THREADS={usable}" in check.hint
    assert f"{cores} of {os.cpu_count()} cores in the affinity mask" in check.detail
    assert ("no cgroup limit" if limit is None else f"cgroup limit {limit:.2g} cores") in check.detail
    if usable > 1:
        llmopt.set_num_threads(1)
        assert "stay idle" in cli_doctor._threads().hint


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_a_mask_is_seen(threads: Callable[[int], None]) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert llmopt.set_num_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not native.available() or not Path("/proc/self/task").is_dir(), reason="no kernels, or no /proc")
def test_kernels_start_no_threads_beside_torchs() -> None:
    code = """
import os, torch, llmopt
from llmopt.models.shapes import tiny_model
llmopt.set_num_threads(3)
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
torch.ones(3000, 3000).sum()
pool = tasks()
assert pool >= before + 2, (before, pool)
model = tiny_model("qwen3")
llmopt.optimize(model, passes=["fuse_kernels"], measure=False, calibration=torch.arange(64).view(2, 32))
with_torch = tasks()
model.generate(torch.arange(1, 300)[None], max_new_tokens=5, do_sample=False, pad_token_id=0)
assert tasks() == with_torch, (with_torch, tasks())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
