"""torch.export to Relax: a part of the decode step becomes a function whose heavy ops are calls back to ours.

An op of ours becomes ``call_dps_packed("llmopt.call_op", ...)``: its first argument says, as JSON, which op it is and where its
tensors and options go. It is called while a step is recorded, never when it runs, so it may be Python.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from llmopt.errors import PassError

CALL_OP = "llmopt.call_op"

_Json = Any


class Recording:
    """What the step needs that is being recorded: programs hold addresses, not references.

    Args:
        shared: all layers share their buffers. Calls of one part make the same calls of ops, in the same order: the n-th tensor
            of a part's first call takes the place of the n-th of every later one. Only where ops alone take tensors, for
            generated kernels are recorded with their own.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._tensors: list[Any] = []
        self._places: dict[str, list[torch.Tensor]] = {}
        self._part: list[torch.Tensor] = []
        self._count = 0
        self._own: set[int] = set()

    def begin(self, part: str, own: set[int]) -> None:
        """A part is about to be called; ``own``: addresses of its arguments, which are no buffers."""
        self._part, self._count, self._own = self._places.setdefault(part, []), 0, own

    def taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that an op is given: itself, or the buffer in its place."""
        if not self._shared:
            self._tensors.append(tensor)
            return tensor
        if self._count == len(self._part):
            self._part.append(tensor)
        place = self._part[self._count]
        self._count += 1
        return tensor if tensor.data_ptr() in self._own else place

    def made(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that an op has made."""
        self._tensors.append(tensor)
        self._own.add(tensor.data_ptr())
        return tensor

    def keep(self, tensors: Any) -> None:
        """Tensors that a generated kernel is given."""
        self._tensors.extend(tensors)

    def kept(self) -> list[Any]:
        """All that must be kept."""
        return [*self._tensors, *self._places.values()]


class _OfThread(threading.local):
    """What this thread records."""

    recording: Recording | None = None


CURRENT = _OfThread()


def call_op(spec: str, *tensors: Any) -> Any:
    """Call an op of ours on the tensors of a compiled function; ``spec`` is made by :class:`_OpCall`."""
    said = json.loads(spec)
    found, recording = [from_dlpack(t) for t in tensors], CURRENT.recording
    if recording is not None:
        found = [recording.taken(t) for t in found]
    op = getattr(torch.ops.llmopt, said["op"]).default
    out = op(*(_argument(a, found) for a in said["args"]))
    if out is None:
        return tensors[said["returns"]] if "returns" in said else None
    if recording is not None:
        recording.made(out)
    import tvm_ffi

    return tvm_ffi.from_dlpack(out)


def _argument(said: _Json, tensors: list[torch.Tensor]) -> Any:
    if isinstance(said, dict):
        tensor = tensors[said["tensor"]]
        return tensor[:, slice(*said["columns"])] if "columns" in said else tensor
    return [_argument(inner, tensors) for inner in said] if isinstance(said, list) else said


class _OpCall:
    """One call of an op in an exported graph, as Relax has it."""

    def __init__(self, node: torch.fx.Node, importer: Any) -> None:
        self.node, self.importer = node, importer
        self.inputs: list[Any] = []  # Relax variables
        self.outputs: list[torch.fx.Node] = []  # allocated for this op alone: it writes them first
        self.in_place: list[torch.fx.Node] = []
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = {a.name: v for a, v in zip(schema, node.args, strict=False)} | node.kwargs
        args: list[_Json] = []
        for argument in schema:
            value = given.get(argument.name, argument.default_value)
            written = argument.alias_info is not None and argument.alias_info.is_write
            args.append(self._written(value) if written and value is not None else self._read(value))
        self.args = args

    def _read(self, value: Any) -> _Json:
        if isinstance(value, torch.fx.Node) and _is_view(value):
            base, _, *columns = value.args
            return {**self._read(base), "columns": columns}
        if isinstance(value, torch.fx.Node):
            self.inputs.append(self.importer.env[value])
            return {"tensor": len(self.inputs) - 1}
        return [self._read(inner) for inner in value] if isinstance(value, list | tuple) else value

    def _written(self, node: torch.fx.Node) -> _Json:
        if _is_new(node):
            self.outputs.append(node)
            return {"output": len(self.outputs) - 1}
        if node.op != "placeholder":
            # TVM's memory plan may have something else in that place by then
            raise PassError(f"compile_tvm: {self.node.target} writes to {node}, which is no argument of its part")
        self.in_place.append(node)
        return self._read(node)

    def emit(self) -> Any:
        """Emit the call; what it writes stands in the importer's table for the nodes that had it allocated."""
        from tvm import relax

        said: dict[str, _Json] = {"op": self.node.target._schema.name.removeprefix("llmopt::")}  # type: ignore[union-attr]
        said["args"] = [self._placed(a) for a in self.args]
        emit, env = self.importer.block_builder.emit, self.importer.env
        if self.outputs:
            types = [self._type(node.meta["val"]) for node in self.outputs]
            call = relax.op.call_dps_packed(CALL_OP, relax.Tuple([self._spec(said), *self.inputs]), out_ty=types)
            var = emit(call)
            for i, node in enumerate(self.outputs):
                env[node] = var if len(self.outputs) == 1 else emit(relax.TupleGetItem(var, i))
            return var
        result = self.node.meta["val"]
        if result is not None:
            call = relax.op.call_pure_packed(CALL_OP, self._spec(said), *self.inputs, ty_args=self._type(result))
            return emit(call)
        (changed,) = self.in_place
        index = next(i for i, var in enumerate(self.inputs) if var.same_as(env[changed]))
        said["returns"] = index
        env[changed] = emit(
            relax.op.call_inplace_packed(
                CALL_OP, self._spec(said), *self.inputs, inplace_indices=index + 1, ty_args=self.inputs[index].ty
            )
        )
        return env[changed]

    def _placed(self, said: _Json) -> _Json:
        if isinstance(said, list):
            return [self._placed(inner) for inner in said]
        if isinstance(said, dict) and "output" in said:
            return {"tensor": len(self.inputs) + said["output"]}
        return said

    def _spec(self, said: dict[str, _Json]) -> Any:
        from tvm.ir import StringImm

        return StringImm(json.dumps(said))

    def _type(self, value: torch.Tensor) -> Any:
        from tvm import relax

        shape = [self._symbols()[str(s)] if isinstance(s, torch.SymInt) else s for s in value.shape]
        return relax.TensorType(shape, str(value.dtype).removeprefix("torch."))

    def _symbols(self) -> dict[str, Any]:
        """Relax's variable of each symbolic size, by torch's name for it."""
        found: dict[str, Any] = {}
        for node in self.node.graph.find_nodes(op="placeholder"):
            var = self.importer.env[node]
            found |= {str(s): v for s, v in zip(node.meta["val"].shape, var.ty.shape, strict=True)}
        return found


def _is_view(node: torch.fx.Node) -> bool:
    """Columns of a matrix that only ops of ours read: they take rows that lie apart, so that nothing need be copied."""
    columns = bool(node.target is torch.ops.aten.slice.Tensor and node.args[1] == 1 and len(node.args) == 4)
    return columns and all(_is_ours(user) for user in node.users)


def _is_ours(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "llmopt"


def _is_new(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.aten.empty.memory_format


def _convert_op(node: torch.fx.Node, importer: Any) -> Any:
    return _OpCall(node, importer).emit()


def _rms_norm(node: torch.fx.Node, importer: Any) -> Any:
    from tvm import relax

    x, shape, weight, eps = node.args
    assert isinstance(shape, list | tuple)
    axes = list(range(-len(shape), 0))
    return importer.block_builder.emit(
        relax.op.nn.rms_norm(importer.env[x], importer.env[weight], axes=axes, epsilon=eps)
    )  # fmt: skip


def _index_select(node: torch.fx.Node, importer: Any) -> Any:
    from tvm import relax

    x, dim, index = node.args
    # the importer's own takes any index for a good one
    return importer.block_builder.emit(relax.op.take(importer.env[x], importer.env[index], dim, mode="clip"))


def _silu(node: torch.fx.Node, importer: Any) -> Any:
    from tvm import relax

    # by exp, which can be had in vectors (FastMathTransform); TVM's sigmoid calls the C library's, value by value
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    exp = emit(relax.op.exp(emit(relax.op.negative(x))))
    return emit(relax.op.divide(x, emit(relax.op.add(exp, relax.const(1.0, "float32")))))


def converters(graph: torch.fx.Graph) -> dict[str, Callable[[torch.fx.Node, Any], Any]]:
    """Converters for the ops of ours in a graph, and for what the importer does not know."""
    found: dict[str, Callable[[torch.fx.Node, Any], Any]] = {
        "rms_norm.default": _rms_norm,
        "index_select.default": _index_select,
        "silu.default": _silu,
        # what an op writes is allocated where it is called
        "empty.memory_format": lambda node, importer: None,
        "slice.Tensor": lambda node, importer: None if _is_view(node) else importer._slice(node),
    }
    found |= {node.target.__name__: _convert_op for node in graph.nodes if _is_ours(node)}
    return found


def imported(module: torch.nn.Module, args: tuple[Any, ...], dynamic: Any) -> Any:
    """The Relax function of a module, every tensor of ``args`` a parameter, in the order of their pytree.

    Args:
        module: without parameters of its own.
        args: real tensors, for shapes and dtypes alone; nothing is copied.
        dynamic: ``dynamic_shapes`` of torch.export.

    Raises:
        PassError: an op writes to what is no parameter, or a tensor is none; torch and TVM raise of their own.
    """
    from tvm.relax.frontend.torch import from_exported_program

    program = torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
    if program.constants or program.state_dict:
        names = [*program.constants, *program.state_dict]
        raise PassError(f"compile_tvm: a part holds {names[0]}, which is no argument of it")
    mod = from_exported_program(
        program, run_ep_decomposition=False, unwrap_unit_return_tuple=True,
        custom_convert_map=converters(program.graph),
    )  # fmt: skip
    # torch assumes sizes of two and more, and tells TVM so; most steps have one token
    return mod["main"].without_attr("tir_var_lower_bound")
