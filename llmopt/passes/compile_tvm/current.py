"""The compiled engine for the modules as they are now, and where its compiled library and its schedules come from."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmopt
import llmopt.ops
from llmopt import native
from llmopt.models.base import ResolvedModel
from llmopt.passes.base import Event
from llmopt.passes.compile_tvm.cache import Cache, RefusedEntryError, key_of
from llmopt.passes.compile_tvm.compiled import Built, Machine, export, load, target
from llmopt.passes.compile_tvm.engine import StepEngine, TvmEngine
from llmopt.passes.compile_tvm.inductor import InductorEngine
from llmopt.passes.compile_tvm.kernels import StepKernels
from llmopt.runtime.generate import Generation

_VERSIONS = ("apache-tvm", "apache-tvm-ffi", "torch")


class Current:
    """The engine behind ``generate``: made when first asked for, forgotten when patches change.

    Args:
        resolved: the model.
        backend: "tvm", "inductor", or "graph": nothing is compiled, the step is a CUDA graph of what TVM would be given.
        on_disk: look for TVM's libraries there, and keep new ones.
        tune_s: seconds to search for faster schedules of a step's kernels before it is first compiled.
        records: the file of schedules; None: one for each step, in the user's cache folder.

    Attributes:
        backend: may be changed; :meth:`switched` then.
        facts: for the receipt: seconds of compiling or loading by TVM, what the cache had, and which schedules were taken.
    """

    def __init__(
        self, resolved: ResolvedModel, backend: str, on_disk: bool, tune_s: float = 0.0, records: Path | None = None
    ) -> None:
        self._resolved, self.backend, self._on_disk = resolved, backend, on_disk
        self._tune_s, self._records = tune_s, records
        self._under: Generation | None = None
        self._engine: StepEngine | None = None
        self._settled = False  # the engine is known to be that of the modules as they are
        self.pooled = False
        self._machines: dict[str, Machine] = {}
        self._tuned: set[str] = set()
        self.facts: dict[str, Any] = {}

    def switched(self, under: Generation | None) -> None:
        """Patches have changed: ``generate`` now stands before ``under``, of fuse_kernels, or before the model's own."""
        self._under, self._settled = under, False

    def get(self, emit: Callable[[Event], None] = lambda event: None) -> StepEngine:
        """The engine; the one there was where it still stands for the model's tensors.

        Args:
            emit: told of what takes time: tuning, and another process that is compiling the same.

        Raises:
            PassError: the step cannot be compiled.
        """
        if not self._settled or self._engine is None:
            engine = self.make(self.backend)
            if self._engine is None or engine.identity() != self._engine.identity():
                # before it counts: one that cannot be compiled must not be taken for one that was
                self._prepare(engine, emit)
                self._engine = engine
            self._settled = True
        return self._engine

    def forget(self) -> None:
        """Tensors have changed, under this pass too."""
        if self._under is not None:
            self._under.changed(pooled=self.pooled)
        self._settled = False

    def adopt(self, engine: StepEngine, backend: str) -> None:
        """Take an engine that :meth:`make` made, with what it has compiled already."""
        self._engine, self.backend, self._settled = engine, backend, True

    def make(self, backend: str) -> StepEngine:
        """A new engine for the modules as they are now, not compiled yet."""
        kinds: dict[str, type[StepEngine]] = {"tvm": TvmEngine, "inductor": InductorEngine, "graph": StepEngine}
        return kinds[backend](self._resolved, self._under.engine() if self._under else None)

    def _prepare(self, engine: StepEngine, emit: Callable[[Event], None]) -> None:
        if not isinstance(engine, TvmEngine):
            return
        kernels = StepKernels(engine, self._records)
        if self._tune_s and kernels.step not in self._tuned:
            kernels.tune(self._tune_s, emit)
            self._tuned.add(kernels.step)
        made_from = {**_made_from(engine), "schedules": kernels.digest()}
        key = key_of(made_from)
        if key not in self._machines:
            started = time.perf_counter()
            self._machines[key] = self._machine(kernels, made_from, emit)
            self.facts |= {"compile_s": time.perf_counter() - started, **kernels.facts}
        engine.machine = self._machines[key]

    def _machine(self, kernels: StepKernels, made_from: dict[str, Any], emit: Callable[[Event], None]) -> Machine:
        """Found on disk, or built. Whatever is wrong with the disk is said, and no reason not to compile."""
        self.facts["cache"] = "off"
        built: Built | None = None

        def waits() -> None:
            emit(Event("progress", "compile_tvm", "another process is compiling this step"))

        if self._on_disk:
            try:
                cache = Cache()
                with cache.building(made_from, on_wait=waits):
                    machine = self._found(cache, made_from)
                    if machine is not None:
                        return machine
                    built = kernels.build()
                    if not kernels.fell_back:
                        _keep(cache, made_from, built)
            except (OSError, RefusedEntryError) as error:
                self.facts["cache"] = f"not kept: {error}"
        return Machine(built or kernels.build(), self._resolved.device)

    def _found(self, cache: Cache, made_from: dict[str, Any]) -> Machine | None:
        try:
            entry = cache.find(made_from)
            if entry is None:
                self.facts["cache"] = "built"
                return None
            machine = Machine(Built(load(entry.library), entry.kernels), self._resolved.device)
        except (OSError, RefusedEntryError) as error:
            self.facts["cache"] = f"built anew: {error}"
            return None
        self.facts["cache"] = "found"
        return machine

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model has an engine of its own, over its own modules
        return {**vars(self), "_engine": None, "_machines": {}, "_settled": False}


def _keep(cache: Cache, made_from: dict[str, Any], built: Built) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "module.so"
        export(built, file)
        cache.add(made_from, built.kernels, file)


@functools.cache
def _sources() -> str:
    """A hash of what is compiled and of what compiles it, which change more often than the version."""
    runtime, ops = Path(llmopt.__file__).parent / "runtime", Path(llmopt.ops.__file__).parent
    files = [*Path(__file__).parent.glob("*.py"), *runtime.glob("*.py"), *ops.glob("*/__init__.py")]
    texts = [file.read_bytes() for file in sorted(files)]
    library = native.library_path()
    return hashlib.sha256(b"\0".join([*texts, library.read_bytes() if library else b""])).hexdigest()


def _made_from(engine: TvmEngine) -> dict[str, Any]:
    """All that decides what is compiled."""
    return {
        "parts": list(engine.kinds),
        "hidden_size": engine.hidden_size,
        "target": target(engine.device),
        "isa": native.active_isa() if native.available() else "",
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "llmopt": llmopt.__version__,
        "sources": _sources(),
    }
