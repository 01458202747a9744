"""Memory of a process, of a model and of the machine, in bytes, from what the kernel counts.

What cannot be read on a system is None, with the reason; nothing is estimated.

``python -m llmopt.measure.memory --child DIR`` is the process that ``measure_isolated`` starts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmopt.errors import InputError, LlmoptError

if TYPE_CHECKING:
    from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 where there is no limit


class Reading(NamedTuple):
    """A figure in bytes and how it was obtained, or None and why there is none."""

    value: int | None
    how: str


class MemoryMeasurementError(LlmoptError, RuntimeError):
    """The process that was to be measured failed; carries the last line of its standard error."""


def peak_rss_reset() -> bool:
    """Start a new peak of resident memory; False where the system cannot (the peak is then of the process's life)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> Reading:
    """Largest resident memory of this process since the last ``peak_rss_reset``, or since its start."""
    value = _status_field("VmHWM")
    if value is None:
        return Reading(None, f"no VmHWM in {_STATUS}")
    return Reading(value, "VmHWM of the whole process")


def current_rss() -> Reading:
    """Resident memory of this process now."""
    value = _status_field("VmRSS")
    return Reading(value, "VmRSS of the whole process" if value is not None else f"no VmRSS in {_STATUS}")


def _status_field(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def module_bytes(module: nn.Module) -> int:
    """Bytes at rest of a module: every storage behind its parameters and buffers, once, however many share it.

    Of a storage that several tensors share out among them (:mod:`llmopt.arena`), what they take of it.
    """
    sizes: dict[int, int] = {}
    views: dict[int, dict[int, int]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        taken = views.setdefault(storage._cdata, {})
        taken[tensor.data_ptr()] = max(taken.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
    return sum(min(size, sum(views[key].values())) if len(views[key]) > 1 else size for key, size in sizes.items())


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory this process can still take: the kernel's MemAvailable, or less where a cgroup (v1 or v2) limits it.

    ``root`` is where ``proc`` and ``sys`` are mounted. None where the system has no ``/proc/meminfo``.
    """
    machine = meminfo("MemAvailable", root)
    if machine is None:
        return None
    rooms = (_cgroup_room(directory) for directory in cgroup_directories("memory", root))
    return min([machine, *(room for room in rooms if room is not None)])


def meminfo(field: str, root: Path = Path("/")) -> int | None:
    """One field of /proc/meminfo, in bytes."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def cgroup_directories(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Directories of this process's cgroup and its ancestors that ``controller`` is governed by, v1 and v2."""
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for entry in entries:
        number, controllers, path = entry.split(":", 2)
        if number == "0" and not controllers:
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        # inside a container the path names the host's tree, and only the mount itself exists
        own = Path(path.lstrip("/"))
        yield from (top / p for p in (own, *own.parents) if (top / p).is_dir())


def _cgroup_room(directory: Path) -> int | None:
    for limit_name, used_name, reclaimable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit_text = (directory / limit_name).read_text().strip()
            used = int((directory / used_name).read_text())
            stat = (directory / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        if limit_text == "max" or int(limit_text) >= _UNLIMITED:
            return None
        cache = next((int(line.split()[1]) for line in stat if line.split()[0] == reclaimable), 0)
        return max(0, int(limit_text) - used + cache)
    return None


@dataclass(frozen=True, slots=True)
class IsolatedMemory:
    """What a process of its own took to load a checkpoint and generate from it."""

    peak_rss: int | None
    imports_rss: int | None  # resident after the imports, before the model
    loaded_rss: int | None  # resident with the model loaded, before the first token
    weight_bytes: int
    prompt_tokens: int
    new_tokens: int
    how: str


def measure_isolated(
    directory: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    implementation: str = "stock",
    threads: int | None = None,
    timeout_s: float = 900.0,
) -> IsolatedMemory:
    """Peak memory of a fresh process that loads ``directory`` and generates: nothing else is in it to be counted.

    Args:
        directory: a Hugging Face checkpoint, or what ``llmopt.save`` wrote.
        prompt_tokens: length of the (random) prompt.
        new_tokens: tokens to generate.
        implementation: ``"eager"`` (attention and experts) or ``"stock"``; without effect on a saved llmopt model.
        threads: torch threads of the child; this process's count by default.
        timeout_s: the child is killed after this many seconds.

    Raises:
        InputError: ``directory`` is none.
        MemoryMeasurementError: the child failed or ran out of time.
    """
    path = Path(directory).resolve()
    if not path.is_dir():
        raise InputError.argument("directory", expected="an existing directory", got=str(directory))
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    options = {"--prompt-tokens": prompt_tokens, "--new-tokens": new_tokens, "--threads": threads}
    command = [sys.executable, "-m", "llmopt.measure.memory", "--child", str(path), "--implementation", implementation]
    command += [text for name, value in options.items() for text in (name, str(value))]
    # `-m` puts the working directory on the import path: make it the one this package was imported from
    package_root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=package_root, check=False)
    except subprocess.TimeoutExpired as error:
        raise MemoryMeasurementError(f"{path}: the measuring process did not end within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoryMeasurementError(f"{path}: the measuring process ended with status {done.returncode}: {last}")
    return IsolatedMemory(**json.loads(done.stdout.splitlines()[-1]))


def _run_child(arguments: argparse.Namespace) -> IsolatedMemory:
    import torch

    from llmopt.cli_models import open_model

    torch.set_num_threads(arguments.threads)
    imports = current_rss().value
    model = open_model(arguments.child, eager=arguments.implementation == "eager").model
    loaded = current_rss().value
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, arguments.prompt_tokens), generator=generator)
    with torch.inference_mode():
        # min_new_tokens: an end-of-text token must not shorten the run
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            do_sample=False,
        )
    peak = peak_rss()
    return IsolatedMemory(
        peak_rss=peak.value,
        imports_rss=imports,
        loaded_rss=loaded,
        weight_bytes=module_bytes(model),
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        how=f"{peak.how} that did nothing but load and generate" if peak.value is not None else peak.how,
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of the measuring process: prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m llmopt.measure.memory")
    parser.add_argument("--child", required=True, metavar="DIR")
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--implementation", choices=("eager", "stock"), default="stock")
    result = _run_child(parser.parse_args(argv))
    print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
