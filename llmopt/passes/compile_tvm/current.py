"""The compiled engine for the modules as they are now, and where its compiled library comes from."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import llmopt
import llmopt.ops
from llmopt import native
from llmopt.models.base import ResolvedModel
from llmopt.passes.compile_tvm.cache import Cache, RefusedEntryError, key_of
from llmopt.passes.compile_tvm.compiled import Built, Machine, build, export, load, target
from llmopt.passes.compile_tvm.engine import StepEngine, TvmEngine
from llmopt.passes.compile_tvm.inductor import InductorEngine
from llmopt.runtime.generate import Generation

_VERSIONS = ("apache-tvm", "apache-tvm-ffi", "torch")


class Current:
    """The engine behind ``generate``: made when first asked for, forgotten when patches change.

    Args:
        resolved: the model.
        backend: "tvm" or "inductor".
        on_disk: look for TVM's libraries there, and keep new ones.

    Attributes:
        backend: may be changed; :meth:`switched` then.
        facts: for the receipt: seconds of compiling or loading by TVM, and what the cache had.
    """

    def __init__(self, resolved: ResolvedModel, backend: str, on_disk: bool) -> None:
        self._resolved, self.backend, self._on_disk = resolved, backend, on_disk
        self._under: Generation | None = None
        self._engine: StepEngine | None = None
        self._machines: dict[str, Machine] = {}
        self.facts: dict[str, Any] = {}

    def switched(self, under: Generation | None) -> None:
        """Patches have changed: ``generate`` now stands before ``under``, of fuse_kernels, or before the model's own."""
        self._under, self._engine = under, None

    def get(self) -> StepEngine:
        """The engine; TVM's is compiled if this process has not compiled or loaded it yet."""
        if self._engine is None:
            self._engine = self.make(self.backend)
        return self._engine

    def make(self, backend: str) -> StepEngine:
        """A new engine for the modules as they are now."""
        under = self._under.engine() if self._under else None
        if backend == "inductor":
            return InductorEngine(self._resolved, under)
        engine = TvmEngine(self._resolved, under)
        made_from = _made_from(engine)
        key = key_of(made_from)
        if key not in self._machines:
            self._machines[key] = self._machine(engine, made_from)
        engine.machine = self._machines[key]
        return engine

    def _machine(self, engine: TvmEngine, made_from: dict[str, Any]) -> Machine:
        started = time.perf_counter()
        self.facts = {"cache": "off"}
        built = self._from_disk(engine, made_from) if self._on_disk else _build(engine)
        machine = Machine(built)
        self.facts["compile_s"] = time.perf_counter() - started
        return machine

    def _from_disk(self, engine: TvmEngine, made_from: dict[str, Any]) -> Built:
        cache = Cache()
        with cache.building(made_from):
            try:
                entry = cache.find(made_from)
                self.facts["cache"] = "built"
            except RefusedEntryError as error:
                entry = None
                self.facts["cache"] = f"built anew: {error}"
            if entry is not None:
                self.facts["cache"] = "found"
                return Built(load(entry.library), entry.kernels)
            built = _build(engine)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "module.so"
                try:
                    export(built, file)
                except RuntimeError as error:
                    # linking takes a C compiler
                    self.facts["cache"] = f"built, not kept: {str(error).splitlines()[0]}"
                    return built
                cache.add(made_from, built.kernels, file)
            return built

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model has an engine of its own, over its own modules
        return {**vars(self), "_engine": None, "_machines": {}}


def _build(engine: TvmEngine) -> Built:
    return build(list(engine.kinds.values()), engine.hidden_size)


@functools.cache
def _sources() -> str:
    """A hash of what is compiled and of what compiles it, which change more often than the version."""
    runtime, ops = Path(llmopt.__file__).parent / "runtime", Path(llmopt.ops.__file__).parent
    files = [*Path(__file__).parent.glob("*.py"), *runtime.glob("*.py"), *ops.glob("*/__init__.py")]
    texts = [file.read_bytes() for file in sorted(files)]
    library = native.library_path()
    assert library is not None
    return hashlib.sha256(b"\0".join([*texts, library.read_bytes()])).hexdigest()


def _made_from(engine: TvmEngine) -> dict[str, Any]:
    """All that decides what is compiled."""
    return {
        "parts": list(engine.kinds),
        "hidden_size": engine.hidden_size,
        "target": target(),
        "isa": native.active_isa(),
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "llmopt": llmopt.__version__,
        "sources": _sources(),
    }
