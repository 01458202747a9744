"""Every Triton kernel compiles for each kind of GPU, spills nothing, and fits its shared memory; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel_compiles_and_spills_nothing(arch: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_aot", "--arch", arch], capture_output=True, text=True, timeout=900,
        check=False, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "_gemv" in done.stdout
    assert "_span" in done.stdout
