"""The environment block of every receipt: processor, threads, memory, versions, kernels, GPU, commit.

Nothing is initialised to find out (no CUDA context, no import of an optional package), and nothing names the machine or
its user.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from llmopt import env, native
from llmopt.errors import InputError, NativeLibraryError
from llmopt.measure import memory

REQUIRED = ("llmopt", "torch", "transformers", "safetensors", "numpy", "apache-tvm-ffi")
OPTIONAL = ("apache-tvm", "triton", "flash-attn", "matplotlib")

# instruction sets that decide which kernels run, or how fast a library's are
_FLAGS = {
    "x86": (
        "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16",
        "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    ),
    "arm": ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}  # fmt: skip


def capture() -> dict[str, Any]:
    """The environment as plain JSON-serialisable data. Sizes are bytes; what is not known is None."""
    import torch

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "memory": {"total": memory.meminfo("MemTotal"), "available": memory.available_bytes()},
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "kernels": kernels(),
        "gpu": gpu(),
        "git": git(),
    }


def cpu(root: Path = Path("/")) -> dict[str, Any]:
    """Model, vendor, relevant ISA flags, cores this process may use, CPU limit of the cgroup (cores), L3 bytes."""
    info = _cpuinfo(root)
    flags = set((info.get("flags") or info.get("Features") or "").split())
    known = _FLAGS["x86"] + _FLAGS["arm"]
    return {
        "model": info.get("model name") or platform.processor() or None,
        "vendor": info.get("vendor_id") or info.get("CPU implementer"),
        "arch": platform.machine(),
        "isa": [flag for flag in known if flag in flags],
        "cores": visible_cores(),
        "core_limit": core_limit(root),
        "l3": l3_bytes(root),
    }


def visible_cores() -> int:
    """Logical cores this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_limit(root: Path = Path("/")) -> float | None:
    """CPU time a cgroup (v1 or v2) allows, in cores; None without a limit."""
    limits = []
    for directory in memory.cgroup_directories("cpu", root):
        try:
            if (directory / "cpu.max").is_file():
                quota, period = (directory / "cpu.max").read_text().split()
            else:
                quota = (directory / "cpu.cfs_quota_us").read_text().strip()
                period = (directory / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def l3_bytes(root: Path = Path("/")) -> int | None:
    """Size of the last-level cache that the first core sees."""
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (index / "level").read_text().strip() != "3":
                continue
            text = (index / "size").read_text().strip()
        except OSError:
            continue
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
    return None


def _cpuinfo(root: Path) -> dict[str, str]:
    try:
        first = (root / "proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def versions() -> dict[str, str | None]:
    """Installed versions by distribution; a required one without metadata is None, an absent optional one left out."""
    found: dict[str, str | None] = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in REQUIRED:
                found[name] = None
    return found


def kernels() -> dict[str, Any]:
    """The compiled kernel library: its path and the instruction set in force, or the reason why there is none."""
    try:
        path = native.library_path()
        isa = native.active_isa()
    except (NativeLibraryError, InputError) as error:
        return {"path": None, "isa": None, "reason": str(error)}
    return {"path": _without_home(path), "isa": isa, "forced": env.forced_isa() is not None, "reason": None}


def _without_home(path: Path | None) -> str | None:
    if path is None:
        return None
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


@functools.cache
def gpu(root: Path = Path("/")) -> dict[str, Any] | None:
    """Names and driver of NVIDIA GPUs, from the driver's own files or nvidia-smi; no CUDA context is made."""
    cards = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    if cards:
        names = [_field(card.read_text(), "Model") for card in cards]
        version = root / "sys/module/nvidia/version"
        return {"names": names, "driver": version.read_text().strip() if version.is_file() else None}
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(", ") for line in done.stdout.splitlines() if ", " in line]
    return {"names": [row[0] for row in rows], "driver": rows[0][1]} if done.returncode == 0 and rows else None


def _field(text: str, name: str) -> str | None:
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


@functools.cache
def git() -> dict[str, Any] | None:
    """Commit and dirty flag when the package runs from its own git checkout, else None."""
    root = Path(__file__).resolve().parents[2]
    tool = shutil.which("git")
    # installed into an environment inside somebody else's checkout, the commit would be theirs
    if tool is None or not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str | None:
        command = [tool, "-C", str(root), "-c", "core.fsmonitor=false", "--no-optional-locks", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, status = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(status) if status is not None else None}
