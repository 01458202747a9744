"""The parts of a decoder compiled by TVM: built once a kind of layer, called once a layer while a step is recorded."""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt import native
from llmopt.errors import PassError
from llmopt.passes.compile_tvm.imported import CALL_OP, CURRENT, Recording, call_op, imported
from llmopt.passes.compile_tvm.part import Part

_AVX2 = ["+avx2", "+fma", "+f16c"]
_AVX512 = [*_AVX2, "+avx512f", "+avx512bw", "+avx512vl", "+avx512dq"]
_FEATURES = {"portable": [], "avx2": _AVX2, "avx512": _AVX512, "amx": _AVX512}
# what torch and TVM raise where something does not fit: everything but what a caller or the system stops with
COMPILERS_RAISE = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError, OSError, ArithmeticError,
)  # fmt: skip
_NO_OP, _SKIP_RUN = 0, 1  # tvm.runtime.vm.VMInstrumentReturnKind
_MACHINES_OWN = ("vm.builtin.", "shape_func")


@dataclass(frozen=True, slots=True)
class Built:
    """What TVM made of some parts.

    Attributes:
        module: a function a part, "part_0", "part_1", ..., in the order they were given.
        kernels: names of the functions that TVM generated; what else is called is ours, or the virtual machine's.
    """

    module: Any
    kernels: tuple[str, ...]


def target(device: torch.device) -> dict[str, Any]:
    """TVM's target for a device."""
    if device.type == "cpu":
        return _host()
    major, minor = torch.cuda.get_device_capability(device)
    return cuda_target(10 * major + minor)


def cuda_target(capability: int) -> dict[str, Any]:
    """TVM's target for GPUs of a compute capability: 90 for 9.0."""
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 48 << 10, "thread_warp_size": 32}
    return {"kind": "cuda", "arch": f"sm_{capability}", **limits, "host": _host()}


def _host() -> dict[str, Any]:
    """Of x86 processors what the kernels' instruction set stands for, no more: a virtual machine may lack what its processor's
    name promises."""
    from tvm.target import codegen

    if platform.machine() not in ("x86_64", "AMD64"):
        return {"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())}
    isa = native.active_isa() if native.available() else "portable"
    return {"kind": "llvm", "mcpu": "x86-64", "mattr": _FEATURES[isa], "fast-math-reassoc": True}


@contextmanager
def compiling(but: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """What torch and TVM raise becomes a PassError that says why, ``but`` for these."""
    try:
        yield
    except PassError:
        raise
    except but:
        raise
    except COMPILERS_RAISE as error:
        raise PassError(f"compile_tvm: the step cannot be compiled: {said(error)}") from error


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@dataclass(frozen=True, slots=True)
class Lowered:
    """Parts as Relax functions that call kernels and ops of ours.

    Attributes:
        mod: TVM's module.
        kernels: the generated kernels (PrimFuncs) by name; for the CPU not scheduled yet, for a GPU by dlight's rules.
        target: as :func:`target` gives it.
    """

    mod: Any
    kernels: dict[str, Any]
    target: dict[str, Any]


def lower(parts: list[Part], hidden_size: int, target: dict[str, Any]) -> Lowered:
    """Export and import parts, and fuse what lies between calls of ops.

    Args:
        parts: of different signatures.
        hidden_size: H.
        target: as :func:`target` gives it.
    """
    import tvm
    from tvm import relax

    functions = {}
    for i, part in enumerate(parts):
        args, free = part.example(hidden_size)
        name = f"part_{i}"
        functions[relax.GlobalVar(name)] = imported(part, args, free).with_attr("global_symbol", name)
    where, pipeline = tvm.target.Target(target), _pipeline(target)
    passes = [
        relax.transform.FastMathTransform(),
        *pipeline.legalize_passes(where),
        *pipeline.dataflow_lower_passes(where),
        # reshapes that have become views
        relax.transform.DeadCodeElimination([var.name_hint for var in functions]),
    ]
    with where, tvm.transform.PassContext():
        mod = tvm.transform.Sequential(passes)(tvm.IRModule(functions))
    # what comes later are functions that compute sizes, which the machine must call
    kernels = {var.name_hint: f for var, f in mod.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
    return Lowered(mod, dict(sorted(kernels.items())), target)


def build(lowered: Lowered, chosen: dict[str, list[Any]]) -> Built:
    """Schedule the kernels and compile.

    Args:
        lowered: by :func:`lower`.
        chosen: schedules other than the default one, by :func:`~llmopt.passes.compile_tvm.schedules.name_of` their kernel.

    Raises:
        RefusedScheduleError: a chosen one is none of its kernel's.
    """
    import tvm
    from tvm import relax

    from llmopt.passes.compile_tvm import schedules

    mod = lowered.mod.clone()
    for name, kernel in lowered.kernels.items() if lowered.target["kind"] == "llvm" else ():
        key = schedules.name_of(kernel)
        schedule = schedules.replayed(kernel, chosen[key]) if key in chosen else schedules.default(kernel)
        mod[name] = schedules.function(schedule)
    where = tvm.target.Target(lowered.target)
    with where, tvm.transform.PassContext():
        finish = tvm.transform.Sequential(_pipeline(lowered.target).finalize_passes(where))
        executable = relax.build(mod, where, relax_pipeline=finish)
    return Built(executable, tuple(lowered.kernels))


def _pipeline(target: dict[str, Any]) -> Any:
    from tvm.relax.backend import cpu_generic, cuda

    return (cpu_generic if target["kind"] == "llvm" else cuda).pipeline


def export(built: Built, file: Path) -> None:
    """Write a shared library.

    Raises:
        OSError: it cannot be written, or there is no compiler to link with.
    """
    from tvm.support import cc

    if cc.get_cc() is None:
        raise OSError("no C++ compiler to link with")
    try:
        built.module.export_library(str(file))
    except RuntimeError as error:
        raise OSError(f"linking failed: {said(error)}") from error


def load(file: Path) -> Any:
    """The module of a library that :func:`export` wrote. It is code: the caller has made sure whose it is.

    Raises:
        OSError: it cannot be loaded.
    """
    import tvm

    try:
        return tvm.runtime.load_module(str(file))
    except RuntimeError as error:
        raise OSError(f"{file}: {said(error)}") from error


class Machine:
    """Calls compiled parts while a program is recorded on this thread.

    TVM's virtual machine allocates what a part needs and calls what it is made of, in order. Ops of ours are recorded as they
    are everywhere; on the CPU generated kernels are recorded here, in place of being called, on a GPU they are launched and
    captured. A recorded step then runs without the machine. One caller at a time.
    """

    def __init__(self, built: Built, device: torch.device) -> None:
        import tvm
        import tvm_ffi

        _register()
        self.kernels = frozenset(built.kernels)
        module = built.module.jit() if hasattr(built.module, "jit") else built.module
        # what a step uses lives as long as the step: a pool would only keep it longer
        self._device = device
        where = [tvm.cpu()] if device.type == "cpu" else [tvm.cuda(device.index or 0), tvm.cpu()]
        self._machine = tvm.relax.VirtualMachine(module, where, memory_cfg="naive")
        instrument = _recording(self.kernels) if device.type == "cpu" else _launching(self.kernels)
        self._machine.set_instrument(tvm_ffi.convert(instrument))
        self._lock = threading.Lock()

    def call(self, name: str, *args: Any) -> Any:
        """The result of a part, to come when the program runs.

        Raises:
            InputError: an op of ours refuses its tensors.
        """
        return self._machine[name](*args)

    @contextmanager
    def asked(self) -> Iterator[Recording]:
        """For one caller at a time; gives what must be kept as long as what is recorded."""
        import tvm_ffi

        on_stream = tvm_ffi.use_torch_stream() if self._device.type == "cuda" else nullcontext()
        with self._lock, on_stream:
            # on a GPU all tensors are kept: TVM would free those that are replaced while a graph is captured
            shared = not self.kernels and self._device.type == "cpu"
            CURRENT.recording = Recording(shared=shared)
            try:
                yield CURRENT.recording
            finally:
                CURRENT.recording = None


def _recording(kernels: frozenset[str]) -> Callable[..., int]:
    # no method: the machine would hold itself, out of sight of the collector
    def on_call(function: Any, name: str, before: bool, _result: Any, *args: Any) -> int:
        if not before:
            return _NO_OP
        if name in kernels:
            native.library().record_call(name, function, args)
            return _SKIP_RUN
        if name == CALL_OP or name.startswith(_MACHINES_OWN):
            return _NO_OP
        # it would run now and never again
        raise PassError(f"compile_tvm: a part calls {name}, which cannot be recorded")

    return on_call


def _launching(kernels: frozenset[str]) -> Callable[..., int]:
    def on_call(_function: Any, name: str, before: bool, _result: Any, *args: Any) -> int:
        if before and name in kernels:
            # a graph holds addresses: what only kernels pass on to each other would be freed behind them
            assert CURRENT.recording is not None
            CURRENT.recording.keep(args)
        return _NO_OP

    return on_call


@functools.cache
def _register() -> None:
    import tvm_ffi

    tvm_ffi.register_global_func(CALL_OP, call_op, override=True)


def as_argument(tensor: torch.Tensor) -> Any:
    """A tensor as the virtual machine takes it: the same memory."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(tensor)
