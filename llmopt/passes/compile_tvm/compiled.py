"""The parts of a decoder compiled by TVM: built once a kind of layer, called once a layer while a step is recorded."""

from __future__ import annotations

import functools
import platform
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt import native
from llmopt.passes.compile_tvm.imported import CALL_OP, KEPT, call_op, imported
from llmopt.passes.compile_tvm.part import Part

_LEVELS = {"portable": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4", "amx": "x86-64-v4"}
_NO_OP, _SKIP_RUN = 0, 1  # tvm.runtime.vm.VMInstrumentReturnKind


@dataclass(frozen=True, slots=True)
class Built:
    """What TVM made of some parts.

    Attributes:
        module: a function a part, "part_0", "part_1", ..., in the order they were given.
        kernels: names of the functions that TVM generated; what else is called is ours, or the virtual machine's.
    """

    module: Any
    kernels: tuple[str, ...]


def target() -> dict[str, Any]:
    """TVM's target: of x86 processors the level that the kernels' instruction set stands for, since virtual machines may lack
    what a processor's name promises."""
    from tvm.target import codegen

    if platform.machine() not in ("x86_64", "AMD64"):
        return {"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())}
    return {"kind": "llvm", "mcpu": _LEVELS[native.active_isa()]}


def build(parts: list[Part], hidden_size: int) -> Built:
    """Export, import and compile parts of different signatures."""
    import tvm
    from tvm import relax
    from tvm.relax.backend.cpu_generic import pipeline

    functions = {}
    for i, part in enumerate(parts):
        args, free = part.example(hidden_size)
        name = f"part_{i}"
        functions[relax.GlobalVar(name)] = imported(part, args, free).with_attr("global_symbol", name)
    where = tvm.target.Target(target())
    kernels: list[str] = []

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def lower(mod: Any, _ctx: Any) -> Any:
        passes = [*pipeline.legalize_passes(where), *pipeline.dataflow_lower_passes(where)]
        lowered = tvm.transform.Sequential(passes)(mod)
        # what comes later are functions that compute sizes, which the machine must call
        kernels.extend(var.name_hint for var, f in lowered.functions.items() if isinstance(f, tvm.tirx.PrimFunc))
        return tvm.transform.Sequential(pipeline.finalize_passes(where))(lowered)

    executable = relax.build(tvm.IRModule(functions), where, relax_pipeline=lower)
    return Built(executable, tuple(sorted(kernels)))


def export(built: Built, file: Path) -> None:
    """Write a shared library.

    Raises:
        RuntimeError: there is no compiler to link with.
    """
    built.module.export_library(str(file))


def load(file: Path) -> Any:
    """The module of a library that :func:`export` wrote. It is code: the caller has made sure whose it is."""
    import tvm

    return tvm.runtime.load_module(str(file))


class Machine:
    """Calls compiled parts while a program is recorded on this thread.

    TVM's virtual machine allocates what a part needs and calls what it is made of, in order. Ops of ours are recorded as they
    are everywhere; generated kernels are recorded here, in place of being called. A recorded step then runs without the
    machine. One caller at a time.
    """

    def __init__(self, built: Built) -> None:
        import tvm
        import tvm_ffi

        _register()
        self.kernels = frozenset(built.kernels)
        module = built.module.jit() if hasattr(built.module, "jit") else built.module
        self._machine = tvm.relax.VirtualMachine(module, tvm.cpu())
        self._machine.set_instrument(tvm_ffi.convert(self._on_call))
        self._lock = threading.Lock()

    def call(self, name: str, *args: Any) -> Any:
        """The result of a part, to come when the program runs."""
        return self._machine[name](*args)

    def _on_call(self, function: Any, name: str, before: bool, _result: Any, *args: Any) -> int:
        if not before or name not in self.kernels:
            return _NO_OP
        native.library().record_call(function, args)
        return _SKIP_RUN

    def __enter__(self) -> list[Any]:
        """Tensors that must be kept as long as what is recorded."""
        self._lock.acquire()
        KEPT.tensors = []
        return KEPT.tensors

    def __exit__(self, *_: object) -> None:
        KEPT.tensors = None
        self._lock.release()


@functools.cache
def _register() -> None:
    import tvm_ffi

    tvm_ffi.register_global_func(CALL_OP, call_op, override=True)


def as_argument(tensor: torch.Tensor) -> Any:
    """A tensor as the virtual machine takes it: the same memory."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(tensor)
