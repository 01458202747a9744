"""``llmopt doctor``: what will run on this machine, what will not, and why."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from llmopt.errors import LlmoptError
from llmopt.measure import environment, memory
from llmopt.measure import format as fmt
from llmopt.threads import usable_cores

Status = Literal["ok", "off", "warn", "fail"]
_EXTRAS = {
    "matplotlib": ("pictures of receipts", "pip install llmopt[plot]"),
    "apache-tvm": ("compiling through TVM", "pip install llmopt[tvm]"),
    "triton": ("GPU kernels", "comes with the CUDA builds of torch"),
    "flash-attn": ("an attention candidate on GPUs", "pip install flash-attn"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: ``ok``, ``off`` (optional, absent), ``warn`` (works, but slower or worse) or ``fail``."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def run_checks() -> Iterator[Check]:
    """Every check, in the order in which they are shown; the slow ones last."""
    yield _python()
    yield from _required()
    yield _cpu()
    yield _threads()
    yield _kernels()
    yield _memory()
    yield _gpu()
    yield from _extras()
    yield _bandwidth()
    yield from _passes()


def to_json(checks: list[Check]) -> dict[str, Any]:
    """The checks and the environment block."""
    return {
        "usable": usable(checks),
        "checks": [asdict(check) for check in checks],
        "environment": environment.capture(),
    }


def usable(checks: list[Check]) -> bool:
    return all(check.status != "fail" for check in checks)


def _lower_bounds() -> dict[str, str]:
    """Least versions by distribution, as the installed package declares them."""
    try:
        required = metadata.requires("llmopt") or []
    except metadata.PackageNotFoundError:
        return {}
    plain = (re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)$", line) for line in required)
    return {match[1]: match[2] for match in plain if match is not None}


def _older(version: str, bound: str) -> bool:
    from packaging.version import Version

    return Version(version) < Version(bound)


def _python() -> Check:
    return Check("python", "ok", platform.python_version())


def _required() -> Iterator[Check]:
    bounds, found = _lower_bounds(), environment.versions()
    for name in environment.REQUIRED:
        version, bound = found[name], bounds.get(name)
        if version is None:
            hint = "run from a checkout without installing it?" if name == "llmopt" else f"pip install {name}"
            yield Check(name, "warn" if name == "llmopt" else "fail", "not installed", hint)
        elif bound is not None and _older(version, bound):
            yield Check(name, "fail", f"{version}, at least {bound} is needed", f"pip install -U '{name}>={bound}'")
        else:
            yield Check(name, "ok", f"{version} (at least {bound})" if bound else version)


def _cpu() -> Check:
    cpu = environment.cpu()
    model = cpu["model"] or cpu["arch"]
    return Check("processor", "ok", f"{model}: {' '.join(cpu['isa']) or 'no vector extensions that matter'}")


def _threads() -> Check:
    import torch

    threads, cores, limit = torch.get_num_threads(), environment.visible_cores(), environment.core_limit()
    quota = "no cgroup limit" if limit is None else f"cgroup limit {limit:.2g} cores"
    text = f"{threads} threads, {cores} of {os.cpu_count()} cores in the affinity mask, {quota}"
    wanted = usable_cores()
    advice = f"llmopt.set_num_threads() or OMP_NUM_THREADS={wanted}"
    if threads > wanted:
        return Check("threads", "warn", text, f"more threads than cores is slow: {advice}")
    if threads < wanted:
        return Check("threads", "warn", text, f"{wanted - threads} of the cores stay idle: {advice}")
    return Check("threads", "ok", text)


def _kernels() -> Check:
    kernels = environment.kernels()
    if kernels["isa"] is None:
        return Check("compiled kernels", "warn", kernels["reason"], "without them llmopt runs on PyTorch")
    forced = " (forced by LLMOPT_ISA)" if kernels["forced"] else ""
    status: Status = "warn" if kernels["isa"] == "portable" else "ok"
    hint = "the portable kernels are much slower than AVX2 or AVX-512" if status == "warn" else ""
    return Check("compiled kernels", status, f"{kernels['isa']}{forced}: {kernels['path']}", hint)


def _memory() -> Check:
    total, available = memory.meminfo("MemTotal"), memory.available_bytes()
    if total is None or available is None:
        return Check("memory", "warn", "not known: no /proc/meminfo")
    return Check("memory", "ok", f"{fmt.size(available)} available of {fmt.size(total)}")


def _gpu() -> Check:
    gpu = environment.gpu()
    if gpu is None:
        return Check("gpu", "off", "no NVIDIA GPU found; llmopt runs on the CPU")
    import torch

    text = f"{', '.join(str(name) for name in gpu['names'])}, driver {gpu['driver'] or 'unknown'}"
    if torch.version.cuda is None:
        return Check("gpu", "warn", text, "this torch is built without CUDA")
    return Check("gpu", "ok", f"{text}, torch CUDA {torch.version.cuda}")


def _extras() -> Iterator[Check]:
    found = environment.versions()
    for name in environment.OPTIONAL:
        use, hint = _EXTRAS[name]
        version = found.get(name)
        yield Check(name, "ok", f"{version}: {use}") if version else Check(name, "off", f"not installed: {use}", hint)


def _bandwidth() -> Check:
    from llmopt.measure.ceilings import CeilingMeter

    with CeilingMeter(("read_gb_per_s",)) as meter:
        samples = [meter.measure_round().get("read_gb_per_s") for _ in range(3)]
        reason = meter.unavailable.get("read_gb_per_s")
    rates = [rate for rate in samples if rate is not None]
    if not rates:
        return Check("read bandwidth", "off", f"not measured: {reason}")
    return Check("read bandwidth", "ok", f"{fmt.number(max(rates))} GB/s now (best of {len(rates)} tries)")


def _passes() -> Iterator[Check]:
    """Ask each pass whether it would apply to a small model of a family that all of them know."""
    import torch

    from llmopt.models.shapes import tiny_model
    from llmopt.models.validate import validate_model
    from llmopt.passes import PASSES
    from llmopt.passes.base import PassContext

    resolved = validate_model(tiny_model("qwen3"))
    context = PassContext(resolved, torch.device("cpu"), emit=lambda event: None)
    for name, pass_type in PASSES.items():
        try:
            verdict = pass_type().check(context)
        except LlmoptError as error:
            yield Check(name, "warn", f"not ready: {error}")
            continue
        yield Check(name, "ok", "ready") if verdict.applies else Check(name, "off", f"not ready: {verdict.reason}")
