"""The environment block: from (made-up) system files, complete, serialisable, silent about the machine's name."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt.measure import environment


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Some Processor
flags\t\t: fpu sse2 avx2 fma f16c avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Another
"""


def test_capture_is_json_and_complete() -> None:
    import torch

    captured = environment.capture()
    assert json.loads(json.dumps(captured)) == captured
    assert set(captured) == {
        "date", "cpu", "threads", "memory", "os", "python", "versions", "kernels", "gpu", "git",
    }  # fmt: skip
    assert captured["threads"] == torch.get_num_threads()
    assert captured["versions"]["torch"] == torch.__version__
    assert captured["python"] == platform.python_version()
    assert captured["date"].endswith("Z")
    assert captured["memory"]["total"] >= captured["memory"]["available"] > 0
    assert (captured["kernels"]["isa"] is None) == bool(captured["kernels"]["reason"])


def test_host_name_is_left_out() -> None:
    text = json.dumps(environment.capture())
    assert f'"{platform.node()}"' not in text
    assert not any("host" in key for key in environment.capture())


def test_cpu_reads_the_first_processor_and_keeps_the_flags_that_matter(tmp_path: Path) -> None:
    cpu = environment.cpu(write(tmp_path, {"proc/cpuinfo": CPUINFO}))
    assert (cpu["model"], cpu["vendor"]) == ("Some Processor", "GenuineIntel")
    assert cpu["isa"] == ["avx2", "fma", "f16c", "avx512f", "avx512_vnni", "amx_int8"]
    assert cpu["l3"] is None
    assert cpu["core_limit"] is None


def test_cpu_without_proc_does_not_fail(tmp_path: Path) -> None:
    cpu = environment.cpu(tmp_path)
    assert cpu["isa"] == []
    assert cpu["cores"] >= 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2_of_a_parent", "v2_unlimited", "v1", "v1_unlimited", "no_cgroup"],
)
def test_core_limit(files: dict[str, str], expected: float | None, tmp_path: Path) -> None:
    assert environment.core_limit(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [("491520K", 480 << 20), ("32M", 32 << 20)], ids=["kilobytes", "megabytes"]
)
def test_l3_is_found_by_level(size: str, expected: int, tmp_path: Path) -> None:
    cache = "sys/devices/system/cpu/cpu0/cache"
    files = {f"{cache}/index2/level": "2", f"{cache}/index2/size": "2048K"}
    files |= {f"{cache}/index3/level": "3\n", f"{cache}/index3/size": f"{size}\n"}
    assert environment.l3_bytes(write(tmp_path, files)) == expected


def test_gpu_is_read_from_the_drivers_files(tmp_path: Path) -> None:
    files = {
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H200\nIRQ:   1\n",
        "sys/module/nvidia/version": "570.86.15\n",
    }
    assert environment.gpu(write(tmp_path, files)) == {"names": ["NVIDIA H200"], "driver": "570.86.15"}


def test_capture_initialises_no_cuda_and_imports_no_optional_package() -> None:
    code = (
        "from llmopt.measure import environment; environment.capture(); import sys, torch; "
        "assert not torch.cuda.is_initialized(); "
        "assert not {'triton', 'tvm', 'flash_attn', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_kernels_say_why_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMOPT_LIBRARY", str(tmp_path / "gone.so"))
    kernels = environment.kernels()
    assert kernels["isa"] is None
    assert "gone.so" in kernels["reason"]
