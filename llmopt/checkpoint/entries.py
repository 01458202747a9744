"""What a model's checkpoint consists of: every tensor of the files as a recipe, made only when it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from llmopt.checkpoint import gptq_format, requantize
from llmopt.checkpoint.experts import ExpertLinears
from llmopt.checkpoint.gptq_format import Codes, GptqTensors
from llmopt.checkpoint.manifest import Requantized
from llmopt.checkpoint.names import disk_names, expert_name, expert_projections
from llmopt.checkpoint.quant_config import ModuleFormat
from llmopt.checkpoint.shard_writer import Entry, whole
from llmopt.errors import InputError, ModelStateError
from llmopt.models.base import ModelFamily
from llmopt.ops.int4_linear import layout
from llmopt.packed import QuantEmbedding, QuantExperts, QuantLinear

_DTYPES = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}
_FIELDS = tuple(_DTYPES)


@dataclass(slots=True)
class Plan:
    """The tensors of a checkpoint, and what the config files must say about them."""

    entries: list[Entry] = field(default_factory=list)
    quantized: dict[str, ModuleFormat] = field(default_factory=dict)  # by name on disk
    left_out: list[str] = field(default_factory=list)  # linears of the decoder layers that are not quantized
    requantized: dict[str, Requantized] = field(default_factory=dict)
    scales: list[Entry] = field(default_factory=list)  # of llmopt.scales
    desc_act: bool = False


class Planner:
    """Walks a model once and plans its checkpoint.

    Args:
        model: the causal LM, quantized or not.
        family: its family.
        originals: unquantized tensors of requantized modules by full parameter name.
        v2: write zero points as GPTQ format v2 does.
    """

    def __init__(self, model: Any, family: ModelFamily, originals: Mapping[str, torch.Tensor], *, v2: bool) -> None:
        self.model, self.family, self.originals, self.v2 = model, family, originals, v2
        self.plan = Plan()
        self._covered: set[str] = set()  # state-dict names that belong to packed modules
        self._tied = bool(model.config.tie_word_embeddings)
        self._done: dict[tuple[str, int], Requantized] = {}  # by source and address of the packed bytes

    def run(self) -> Plan:
        """Plan the checkpoint.

        Raises:
            ModelStateError: the model has tensors its class does not have, or lacks some.
            InputError: an original does not fit its module.
        """
        for name, module in self.model.named_modules():
            if name in self._covered:
                continue
            if isinstance(module, QuantEmbedding) or (isinstance(module, QuantLinear) and name == self.family.head):
                self._requantized(name, module)
            elif isinstance(module, QuantLinear):
                self._linear(name, name, module)
            elif isinstance(module, QuantExperts):
                self._experts(name, module.num_experts, partial(_fused_linears, module))
            elif isinstance(module, ExpertLinears):
                self._experts(name, module.num_experts, module.linears)
            elif isinstance(module, torch.nn.Linear) and name.startswith(f"{self.family.layers}."):
                self.plan.left_out.append(name)
                continue
            else:
                continue
            self._covered.update((name, *(f"{name}.{n}" for n, _ in module.named_modules() if n)))
        self._plain()
        return self.plan

    def _linear(self, name: str, disk: str, module: QuantLinear) -> None:
        self._gptq(disk, module.out_features, module.in_features, module, partial(linear_codes, module))
        if module.bias is not None:
            self.plan.entries.append(whole(f"{disk}.bias", module.bias))
        self.plan.desc_act |= module.perm is not None

    def _gptq(self, disk: str, n: int, k: int, module: QuantLinear | QuantExperts, make: Callable[[], Codes]) -> None:
        bits = module.bits if isinstance(module, QuantLinear) else 4
        self.plan.quantized[disk] = ModuleFormat(bits, module.group_size, not module.asymmetric)
        groups = 1 if module.group_size == -1 else -(-k // module.group_size)
        packed = _PackedOnce(lambda: gptq_format.pack(make(), bits=bits, v2=self.v2))
        for part, shape in gptq_format.shapes(n, k, groups, bits).items():
            self.plan.entries.append(Entry(f"{disk}.{part}", _DTYPES[part], shape, packed.recipe(part)))

    def _experts(self, name: str, count: int, linears: Callable[[int], tuple[Any, Any, Any]]) -> None:
        moe = self.family.moe
        assert moe is not None, f"{name}: experts in a family without any"
        for expert in range(count):
            for proj, linear in zip(expert_projections(self.family.mlp), linears(expert), strict=True):
                disk = expert_name(name, moe, expert, proj)
                if isinstance(linear, QuantLinear):
                    self._linear(f"{name}.{expert}.{proj}", disk, linear)
                else:
                    n, k, module, make = linear
                    self._gptq(disk, n, k, module, make)

    def _requantized(self, name: str, module: QuantLinear | QuantEmbedding) -> None:
        tensor = f"{self.family.embedding if self._tied else name}.weight"
        dtype = module.dtype if isinstance(module, QuantEmbedding) else model_dtype(self.model, self.family)
        if isinstance(module, QuantLinear) and module.bias is not None:
            self.plan.entries.append(whole(f"{name}.bias", module.bias))
        shared = self._done.get((tensor, module.packed.data_ptr()))
        grid = None if shared else requantize.grid_of(module)
        scales = shared.scales if shared else name
        if grid is not None:
            self._write_source(tensor, name, module, grid, dtype)
        linear = isinstance(module, QuantLinear)
        record = Requantized(
            kind="linear" if linear else "embedding", tensor=tensor, bits=module.bits, group_size=module.group_size,
            sha256=shared.sha256 if shared else requantize.sha256(module.packed), scales=scales,
            asymmetric=module.asymmetric if isinstance(module, QuantLinear) else False,
            permuted=isinstance(module, QuantLinear) and module.perm is not None,
            dtype="" if linear else str(dtype).removeprefix("torch."),
        )  # fmt: skip
        self._done[tensor, module.packed.data_ptr()] = record
        self.plan.requantized[name] = record

    def _write_source(
        self, tensor: str, name: str, module: QuantLinear | QuantEmbedding, grid: requantize.Grid, dtype: torch.dtype
    ) -> None:
        """The unquantized tensor: the original if its nearest codes are the packed ones, else what the codes mean."""
        source = self._source(tensor, (grid.out_features, grid.in_features))
        fits = source is not None and requantize.reproduces(lambda a, b: source[a:b], grid, module.packed)
        written = any(entry.name == tensor for entry in self.plan.entries)
        if not fits and (written or self._plain_user(tensor) is not None):
            raise ModelStateError(
                f"model: expected {name} to hold the nearest codes of {tensor}, which another module uses too; "
                "a checkpoint has no place for a second version of it"
            )
        if source is not None and fits and not written:
            self.plan.entries.append(whole(tensor, source))
        elif not written:
            shape = (grid.out_features, grid.in_features)
            recipe = partial(requantize.dequantized_rows, module, grid, dtype)
            self.plan.entries.append(Entry(tensor, dtype, shape, recipe))
        parts = {"scales": grid.scales, "zeros": grid.zeros, "perm": grid.perm}
        self.plan.scales += [whole(f"{name}.{part}", t) for part, t in parts.items() if t is not None]

    def _source(self, tensor: str, shape: tuple[int, int]) -> torch.Tensor | None:
        found = self.originals.get(tensor, self._plain_user(tensor))
        if found is not None and (tuple(found.shape) != shape or not found.is_floating_point()):
            raise InputError.argument(
                f"originals[{tensor!r}]", expected=f"floating point {shape}", got=(found.dtype, tuple(found.shape))
            )
        return None if found is None else found.detach()

    def _plain_user(self, tensor: str) -> torch.Tensor | None:
        """The weight of a module that uses the same tensor and was itself left alone."""
        users = [tensor.removesuffix(".weight")]
        if self._tied:
            users += [self.family.embedding, self.family.head]
        weights = (getattr(self.model.get_submodule(user), "weight", None) for user in users)
        return next((weight for weight in weights if weight is not None), None)

    def _plain(self) -> None:
        state = {n: t for n, t in self.model.state_dict().items() if n.rpartition(".")[0] not in self._covered}
        head, table = f"{self.family.head}.weight", f"{self.family.embedding}.weight"
        if self._tied and head in state:
            if table in state and state[head].data_ptr() != state[table].data_ptr():
                raise ModelStateError(
                    f"model: expected {head} and {table} to be one tensor (config.tie_word_embeddings), got two"
                )
            del state[head]
        self._check_names(set(state))
        fused = {n: t for n, t in state.items() if self._is_fused(n)}
        written = {entry.name for entry in self.plan.entries}
        for name, disk in disk_names(self.model, [n for n in state if n not in fused]).items():
            if disk not in written:
                self.plan.entries.append(whole(disk, state[name]))
        for name, tensor in fused.items():
            self.plan.entries += self._unfused(name, tensor)

    def _is_fused(self, name: str) -> bool:
        moe = self.family.moe
        return moe is not None and name.endswith((f".{moe.experts}.{moe.gate_up}", f".{moe.experts}.{moe.down}"))

    def _unfused(self, name: str, tensor: torch.Tensor) -> Iterator[Entry]:
        moe, mlp = self.family.moe, self.family.mlp
        assert moe is not None
        experts, _, part = name.rpartition(".")
        for expert in range(tensor.shape[0]):
            if part == moe.down:
                yield whole(f"{expert_name(experts, moe, expert, mlp.down)}.weight", tensor[expert])
                continue
            gate, up = tensor[expert].chunk(2)
            yield whole(f"{expert_name(experts, moe, expert, mlp.gate)}.weight", gate)
            yield whole(f"{expert_name(experts, moe, expert, mlp.up)}.weight", up)

    def _check_names(self, plain: set[str]) -> None:
        """A pass that is still on, or a wrapper, may have renamed things: then others could not read the file."""
        config = copy.deepcopy(self.model.config)
        config._attn_implementation = "eager"  # whatever is in force now need not exist for a new model
        with torch.device("meta"):
            fresh = type(self.model)(config).state_dict()
        unknown = sorted(plain - set(fresh))
        missing = sorted(
            n for n in fresh if n not in plain and n.rpartition(".")[0] not in self._covered
            and not (n == f"{self.family.head}.weight" and self._tied)
        )  # fmt: skip
        if unknown or missing:
            raise ModelStateError(
                f"model: expected the tensors of {type(self.model).__name__}; "
                f"unknown: {', '.join(unknown[:3]) or 'none'}; missing: {', '.join(missing[:3]) or 'none'}"
            )


class _PackedOnce:
    """The tensors of one linear are packed together, written one after the other, then let go."""

    def __init__(self, make: Callable[[], GptqTensors]) -> None:
        self._make = make
        self._made: GptqTensors | None = None

    def recipe(self, part: str) -> Callable[[], Iterable[torch.Tensor]]:
        def blocks() -> Iterable[torch.Tensor]:
            made = self._made or self._make()
            self._made = None if part == _FIELDS[-1] else made
            return (getattr(made, part),)

        return blocks


def linear_codes(module: QuantLinear) -> Codes:
    """The codes of a packed linear, columns in their original order."""
    q, scales, zeros = module.codes()
    g_idx = gptq_format.contiguous_groups(module.in_features, module.group_size)
    if module.perm is not None:
        back = torch.argsort(module.perm)
        q, g_idx = q[:, back], g_idx[back.cpu()]
    return Codes(q.cpu(), scales.cpu(), _zeros(zeros, scales, module.bits).cpu(), g_idx)


def model_dtype(model: Any, family: ModelFamily) -> torch.dtype:
    """The dtype of a model's rows of embedding, which is that of everything but its float32 islands."""
    module = model.get_submodule(family.embedding)
    dtype: torch.dtype = module.dtype if isinstance(module, QuantEmbedding) else module.weight.dtype
    return dtype


def _zeros(zeros: torch.Tensor | None, scales: torch.Tensor, bits: int) -> torch.Tensor:
    if zeros is not None:
        return zeros
    return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=scales.device)


def _fused_linears(module: QuantExperts, expert: int) -> tuple[Any, Any, Any]:
    """One expert's linears as ``(N, K, module, recipe for its codes)``: gate, up, down."""
    wide, inner = module.hidden_dim, module.intermediate_dim
    return (
        (inner, wide, module, partial(_expert_codes, module, "gate_up", expert, range(inner))),
        (inner, wide, module, partial(_expert_codes, module, "gate_up", expert, range(inner, 2 * inner))),
        (wide, inner, module, partial(_expert_codes, module, "down", expert, range(wide))),
    )


def _expert_codes(module: QuantExperts, part: str, expert: int, rows: range) -> Codes:
    """Codes of some rows of one expert, unpacked from the tiles they lie in."""
    if part == "gate_up":
        packed, in_features, group = module.gate_up, module.hidden_dim, module.gate_up_group
    else:
        packed, in_features, group = module.down, module.intermediate_dim, module.down_group
    first, last = rows.start // layout.TILE_ROWS, -(-rows.stop // layout.TILE_ROWS)
    before = rows.start - first * layout.TILE_ROWS
    q, scales, zeros = layout.unpack(
        packed[expert, first:last].cpu(), out_features=before + len(rows), in_features=in_features, group_size=group,
        bits=4, asymmetric=module.asymmetric,
    )  # fmt: skip
    groups = 1 if module.group_size == -1 else scales.shape[1]
    scales = scales[before:, :groups]
    zeros = None if zeros is None else zeros[before:, :groups]
    g_idx = gptq_format.contiguous_groups(in_features, module.group_size)
    return Codes(q[before:], scales, _zeros(zeros, scales, 4), g_idx)
