"""compile_tvm on a GPU, without one: kernels compiled for it, the step's parts on a device other than the CPU, the choice."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from llmopt import env, native
from llmopt.models import FAMILIES, resolve_model
from llmopt.models.shapes import tiny_model
from llmopt.passes import CompileTvm
from llmopt.passes import compile_tvm as pass_module
from llmopt.passes.base import PassContext
from llmopt.passes.compile_tvm import trial
from llmopt.runtime import latent
from llmopt.runtime.engine import Engine
from llmopt.runtime.latent import LatentBlock

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

from tvm.support import nvcc  # noqa: E402

from llmopt.passes.compile_tvm import compiled  # noqa: E402
from llmopt.passes.compile_tvm.engine import TvmEngine  # noqa: E402
from llmopt.passes.compile_tvm.imported import CURRENT, Recording  # noqa: E402

CUDA = torch.device("cuda")
every_family = pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])


def cuda_source(module: Any) -> str:
    """The CUDA C++ inside a built module; the driver's library is wanted for more."""
    if module.kind == "cuda":
        return str(module.inspect_source())
    return "".join(cuda_source(inner) for inner in module.imports)


@pytest.mark.parametrize("capability", [80, 90, 100])
@every_family
def test_every_kernel_is_scheduled_and_compiles_for_a_gpu(family: str, capability: int) -> None:
    engine = TvmEngine(resolve_model(tiny_model(family)), None)
    lowered = compiled.lower(list(engine.kinds.values()), engine.hidden_size, compiled.cuda_target(capability))
    assert "rms_norm" in lowered.kernels
    for name, kernel in lowered.kernels.items():
        assert kernel.attrs["tirx.is_scheduled"], name
    built = compiled.build(lowered, {})
    assert set(built.kernels) == set(lowered.kernels)
    source = cuda_source(built.module.mod)
    for name in built.kernels:
        assert f"{name}_kernel" in source, name
    if shutil.which("nvcc") is not None:
        with tvm.target.Target(lowered.target):
            assert nvcc.compile_cuda(source, target_format="cubin", compiler="nvcc")


@every_family
def test_a_step_is_exported_on_the_models_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    resolved = resolve_model(model)
    # packed on the CPU, once, and moved: looks at values
    latents = [a for a, _ in Engine(resolved).layers if isinstance(a, LatentBlock)]
    halves = {id(a._module.kv_b_proj): tuple(t.to("meta") for t in a.halves()) for a in latents}
    monkeypatch.setattr(latent, "_halves_of", lambda kv_b, heads, nope: halves[id(kv_b)])
    model.to("meta")
    engine = TvmEngine.__new__(TvmEngine)
    monkeypatch.setattr("llmopt.passes.compile_tvm.engine.as_argument", lambda tensor: tensor)
    monkeypatch.setattr("llmopt.passes.compile_tvm.engine._aligned", lambda tensor: tensor)
    engine.__init__(resolve_model(model), None)  # type: ignore[misc]
    for part in engine.kinds.values():
        args, free = part.example(engine.hidden_size)
        program = torch.export.export(part, args, dynamic_shapes=free, strict=False)
        for node in program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                assert value.device.type == "meta", f"{node}: {value.device}"


def test_what_a_kernel_is_given_is_kept_and_it_runs() -> None:
    launched = compiled._launching(frozenset({"kernel"}))
    CURRENT.recording = Recording(shared=False)
    try:
        assert launched(None, "kernel", True, None, "a", "b") == 0
        assert launched(None, "kernel", False, None, "c") == 0
        assert launched(None, "vm.builtin.reshape", True, None, "d") == 0
        assert CURRENT.recording.kept() == ["a", "b"]
    finally:
        CURRENT.recording = None


def context(family: str = "qwen3") -> PassContext:
    return PassContext(resolve_model(tiny_model(family)), CUDA, lambda event: None)


def test_the_pass_applies_where_a_gpu_and_a_compiler_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "kernels_for", lambda kind: True)
    monkeypatch.setattr(env, "tvm_without_cuda_compiler", lambda: "")
    assert CompileTvm().check(context()).applies
    assert "for the CPU" in CompileTvm(backend="inductor").check(context()).reason
    assert "tuned for the CPU" in CompileTvm(tune_s=1.0).check(context()).reason
    monkeypatch.setattr(env, "tvm_without_cuda_compiler", lambda: "needs NVRTC")
    assert CompileTvm().check(context()).reason == "needs NVRTC"
    monkeypatch.setattr(env, "tvm_without_cuda_compiler", lambda: "")
    monkeypatch.setattr(pass_module, "kernels_for", lambda kind: False)
    assert "Triton" in CompileTvm().check(context()).reason


def test_tvm_is_told_of_nvcc_only_where_nvrtc_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TVM_CUDA_COMPILE_MODE"
    monkeypatch.setenv(name, "nvcc")  # so that it is put back
    monkeypatch.delenv(name)
    monkeypatch.setattr(env, "_importable", lambda module: True)
    assert env.tvm_without_cuda_compiler() == ""
    assert name not in env.os.environ
    monkeypatch.setattr(env, "_importable", lambda module: False)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert "cuda-bindings" in env.tvm_without_cuda_compiler()
    assert name not in env.os.environ
    monkeypatch.setattr(shutil, "which", lambda program: "/usr/bin/nvcc")
    assert env.tvm_without_cuda_compiler() == ""
    assert env.os.environ[name] == "nvcc"
    monkeypatch.setenv(name, "nvrtc")
    assert "cuda-bindings" in env.tvm_without_cuda_compiler()


@pytest.mark.parametrize(("low", "kept"), [(1.02, "tvm"), (0.99, "graph"), (float("nan"), "graph")])
def test_a_graph_alone_is_taken_unless_tvm_wins(low: float, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Current:
        backend = "tvm"

        def make(self, backend: str) -> str:
            return f"engine of {backend}"

        def get(self) -> str:
            return "engine of tvm"

        def adopt(self, engine: str, backend: str) -> None:
            assert engine == f"engine of {backend}"
            self.backend = backend

    current: Any = Current()
    asked: list[Any] = []

    def compare(engines: Any, depth: int) -> dict[str, Any]:
        asked.append((engines, depth))
        return {"ratio": {"value": 1.0, "low": low, "high": 1.2}}

    monkeypatch.setattr(trial, "compare", compare)
    found = trial.against_graph(context(), current)
    assert current.backend == kept
    assert list(asked[0][0]) == ["tvm", "graph"]  # the ratio is the second's time to the first's
    assert found["ratio"]["high"] == 1.2


def test_graphs_let_tvm_ask_the_driver_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.runtime import program

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, pool, capture_error_mode: nullcontext(modes.append(capture_error_mode))
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

    class Step:
        ids = torch.zeros(1)

        class rows:
            position = slot = torch.zeros(1)

        def to_last_slots(self) -> None: ...

        def make_calls(self) -> None: ...

    engine = TvmEngine(resolve_model(tiny_model("qwen3")), None)
    for graphs in (engine._graphs, program.GraphMemory()):
        program.GraphProgram(Step(), graphs)  # type: ignore[arg-type]
    assert modes == ["relaxed", "thread_local"]
