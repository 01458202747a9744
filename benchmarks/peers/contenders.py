"""Who takes part: how each is made ready, and where it does not apply, with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers import environments, model_files
from benchmarks.peers.jobs import Job, Times
from benchmarks.peers.llama_bench import LlamaBench
from benchmarks.peers.worker import ContenderError, Worker

OURS, EAGER = "llmopt", "eager"
SMALL = "small"
_WORKERS = "benchmarks.peers.workers"


class Timed(Protocol):
    """A contender made ready: a ``Worker``, or something that behaves like one."""

    is_running: bool
    warms_itself: bool  # its first figure of a turn is as good as the others

    def start(self, timeout_s: float) -> dict[str, Any]: ...

    def run(self, job: Job, timeout_s: float) -> Times: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Setup:
    """What contenders are made from."""

    shape: str
    jobs: tuple[Job, ...]  # none: to be loaded and looked at only
    threads: int
    cache: Path  # environments, model files and logs
    say: Callable[[str], None]
    passes: str = ""  # of ours, comma-separated; empty: all
    isa: str = ""  # of ours; empty: the best here
    kv_dtype: str = ""  # of ours; empty: the model's
    ik_bench: Path | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table."""

    name: str
    label: str
    make: Callable[[Setup], Timed]
    is_peer: bool = True  # False: ours, and transformers without quantization
    takes_moe: bool = False
    is_usual: bool = True  # takes part where nobody is named


def usual() -> list[str]:
    return [contender.name for contender in FIELD.values() if contender.is_usual]


def make(name: str, setup: Setup) -> Timed:
    """Environment, files and process of a contender; the process is not started yet.

    Raises:
        ContenderError: it does not apply here, or could not be set up; the message says why.
    """
    contender = FIELD[name]
    if setup.shape == SMALL and contender.is_peer:
        raise ContenderError("the small shape is for tests of the driver")
    if setup.shape != SMALL and model_files.is_moe(setup.shape) and not contender.takes_moe:
        raise ContenderError("its unquantized MoE weights are too large to start from; not set up for MoE shapes")
    return contender.make(setup)


def _worker(setup: Setup, name: str, python: Path | str, module: str, *arguments: object) -> Worker:
    variables = {
        **os.environ,
        "LLMOPT_ISA": setup.isa or os.environ.get("LLMOPT_ISA", ""),
        "OMP_NUM_THREADS": str(setup.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # what torch.compile makes is kept, as the environments are
        "TORCHINDUCTOR_CACHE_DIR": str(setup.cache / "inductor"),
    }
    command = [str(python), "-m", f"{_WORKERS}.{module}", *map(str, arguments)]
    return Worker(command, variables, model_files.ROOT, setup.cache / "logs" / f"{setup.shape}.{name}.log")


def _transformers(name: str) -> Callable[[Setup], Timed]:
    def build(setup: Setup) -> Timed:
        ours = [setup.passes or "all", *([setup.kv_dtype] if setup.kv_dtype else [])] if name == OURS else []
        return _worker(setup, name, sys.executable, "hf", name, setup.shape, *ours)

    return build


def _gguf(setup: Setup, kind: str, name: str = "llama-cpp") -> tuple[Path, Path]:
    python = environments.ensure(name, setup.cache / "envs", setup.say)
    files = setup.cache / "models"
    return python, model_files.gguf_file(setup.shape, kind, files, python, setup.threads, setup.say)


def _llama_cpp(kind: str, name: str = "llama-cpp") -> Callable[[Setup], Timed]:
    def build(setup: Setup) -> Timed:
        python, file = _gguf(setup, kind, name)
        sequences = max((job.sequences for job in setup.jobs), default=1)
        context = max((job.sequences * (job.depth + job.tokens) for job in setup.jobs), default=256)
        return _worker(setup, f"{name}-{kind}", python, "llama_cpp_python", file, setup.threads, sequences, context)

    return build


def _openvino(setup: Setup) -> Timed:
    python = environments.ensure("openvino", setup.cache / "envs", setup.say)
    folder = model_files.openvino_export(setup.shape, setup.cache / "models", python, setup.say)
    return _worker(setup, "openvino-int4", python, "openvino_int4", folder, setup.threads)


def _torchao(setup: Setup) -> Timed:
    python = environments.ensure("torchao", setup.cache / "envs", setup.say)
    sequences = ",".join(str(n) for n in sorted({job.sequences for job in setup.jobs}))
    return _worker(setup, "torchao-int4", python, "torchao_int4", setup.shape, sequences)


def _ik(setup: Setup) -> Timed:
    if setup.ik_bench is None:
        raise ContenderError("not given: IK_BENCH=path/to/llama-bench")
    if not setup.ik_bench.is_file():
        raise ContenderError(f"there is no {setup.ik_bench.name} at the path given")
    _, file = _gguf(setup, "q4_0")
    together = setup.jobs if model_files.is_moe(setup.shape) else ()
    return LlamaBench(setup.ik_bench, file, setup.threads, together)


FIELD: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(OURS, "llmopt", _transformers(OURS), is_peer=False, takes_moe=True),
        Contender("llama-cpp-q4_0", "llama.cpp Q4_0", _llama_cpp("q4_0"), takes_moe=True),
        Contender("llama-cpp-q4_k_m", "llama.cpp Q4_K_M", _llama_cpp("q4_k_m")),
        Contender(
            "llama-cpp-avx2-q4_0",
            "llama.cpp Q4_0, AVX2",
            _llama_cpp("q4_0", "llama-cpp-avx2"),
            takes_moe=True,
            is_usual=False,
        ),
        Contender("ik-q4_0", "ik_llama.cpp Q4_0", _ik, takes_moe=True),
        Contender("openvino-int4", "OpenVINO int4", _openvino),
        Contender("torchao-int4", "torchao int4, compiled", _torchao),
        Contender("stock", "transformers, bf16", _transformers("stock"), is_peer=False),
        Contender(EAGER, "eager, bf16", _transformers(EAGER), is_peer=False),
    )
}
