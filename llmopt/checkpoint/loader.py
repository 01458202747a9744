"""Fills a model on the meta device from opened files: all names, shapes and dtypes are checked first."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from llmopt.arena import WeightArena
from llmopt.checkpoint import install, requantize
from llmopt.checkpoint.gptq_source import GptqSource, LinearFormat
from llmopt.checkpoint.hashes import HashChecks
from llmopt.checkpoint.inventory import Inventory
from llmopt.checkpoint.manifest import MANIFEST, SCALES, Manifest, Requantized
from llmopt.checkpoint.names import disk_names, expert_name, expert_projections, fused_names, is_kept_fp32
from llmopt.checkpoint.quant_config import Settings, kernel_settings
from llmopt.checkpoint.requantize import Grid
from llmopt.checkpoint.safety import CheckpointFiles
from llmopt.checkpoint.shard_reader import Shard
from llmopt.checkpoint.skeleton import DTYPE_NAMES
from llmopt.errors import CheckpointError
from llmopt.models.base import ExpertsSite, ResolvedModel
from llmopt.packed import QuantEmbedding

_log = logging.getLogger("llmopt")
# computed, and stored all the same by old versions of transformers
_COMPUTED = (r"\.rotary_emb\.inv_freq$",)
_MAX_EXTRA_LAYERS = 16

Job = Callable[[], None]


class Loader:
    """Plans and carries out the loading of one checkpoint.

    Args:
        files: the opened checkpoint.
        resolved: the model on the meta device.
        settings: of its quantized linears.
        manifest: ``llmopt.json``, if there is one.
        scales: the opened ``llmopt.scales``, if there is one.
        dtype: of everything unquantized. None: as stored where llmopt wrote it, else what the config says.
        device: where the weights go.
    """

    def __init__(
        self, files: CheckpointFiles, resolved: ResolvedModel, *, settings: Settings | None, manifest: Manifest | None,
        scales: Shard | None, dtype: torch.dtype | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.files, self.resolved, self.settings, self.manifest = files, resolved, settings, manifest
        self.scales, self.dtype, self.device = scales, dtype, device
        self.model: Any = resolved.model
        self.family = resolved.family
        self.inventory = Inventory(files)
        config: Any = self.model.config
        self.tied = bool(config.tie_word_embeddings)
        self._state = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self._todo = dict.fromkeys(self._state)  # names still to be found in the files
        self._packed: dict[tuple[str, str, int, str], torch.Tensor] = {}  # requantized bytes that several modules share
        self._tie_head = False
        self._arena = WeightArena(self.inventory.num_bytes())
        self._checks: HashChecks | None = None
        self._packed_bytes = sum(  # at least: padding of rows and columns, and zero points, come on top
            info.stop - info.start for shard in files.shards for name, info in shard.tensors.items()
            if name.endswith((".qweight", ".scales"))
        )  # fmt: skip

    def plan(self) -> list[Job]:
        """Check everything that the headers tell; what is left is to run the jobs.

        Raises:
            CheckpointError: the files do not hold this model.
        """
        # memory in the order of execution: a step ends with the head, and the next begins with the first layer
        jobs = [*self._requantized_jobs(), *self._packed_jobs(), *self._head_jobs()]
        fused = {n for layer in self.resolved.layers if layer.experts for n in fused_names(layer.experts)}
        # asking transformers takes longer than all the rest of the plan, and most families rename nothing
        disk = disk_names(self.model, [n for n in self._todo if n not in fused and n not in self.inventory])
        for name in self._todo:
            found = self.inventory.take([disk.get(name, name), name], self._state[name])
            if found is not None:
                jobs.append(partial(self._plain, name, found))
        self.inventory.finish(self._ignorable())
        return jobs

    def run(self, jobs: list[Job], checks: HashChecks) -> None:
        """Install everything.

        Args:
            jobs: of :meth:`plan`.
            checks: take the bytes that were quantized again.

        Raises:
            CheckpointError: values that cannot be: NaN, zero scales, indices out of range.
        """
        self._checks = checks
        with self._arena.populated(self._packed_bytes if self.device.type == "cpu" else 0):
            for job in jobs:
                job()
        if self._tie_head:
            self.resolved.head.module.weight = self.resolved.embedding.weight
        empty = [n for n, t in (*self.model.named_parameters(), *self.model.named_buffers()) if t.is_meta]
        assert not empty, f"tensors that no checkpoint has and nothing computed: {empty[:3]}"

    def _ignorable(self) -> list[str]:
        """Patterns of what the model has no use for: what its class names, and layers of multi-token prediction."""
        config, layers = self.model.config, re.escape(self.family.layers)
        extra = range(len(self.resolved.layers), len(self.resolved.layers) + (_extra_layers(config)))
        own = self.model._keys_to_ignore_on_load_unexpected or ()
        return [*own, *_COMPUTED, *(rf"^{layers}\.{i}\." for i in extra)]

    def _put(self, name: str, value: nn.Module | torch.Tensor) -> None:
        install.put(self.model, name, value.to(self.device))

    def _take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory on the CPU: where the weights stay, or from where they go to another device."""
        return self._arena.take(shape) if self.device.type == "cpu" else torch.empty(shape, dtype=torch.uint8)

    def _dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        if self.dtype is None:
            return stored
        return torch.float32 if is_kept_fp32(self.family, name) else self.dtype

    def _plain(self, name: str, found: str) -> None:
        shard = self.inventory.shard(found)
        self._put(name, install.read_plain(shard, found, self._dtype(name, shard.tensors[found].dtype)))

    def _claim(self, *names: str) -> None:
        for name in names:
            self._todo.pop(name, None)

    # -- quantized linears ---------------------------------------------------------------------------------------------

    def _packed_jobs(self) -> Iterator[Job]:
        experts = {layer.experts.name: layer.experts for layer in self.resolved.layers if layer.experts is not None}
        for name, module in self.model.named_modules():
            if name in experts:
                yield from self._experts_jobs(experts[name])
            elif isinstance(module, nn.Linear) and f"{name}.qweight" in self.inventory:
                self._claim(f"{name}.weight", f"{name}.bias")
                form = self.inventory.gptq(name, self.settings, (module.out_features, module.in_features))
                bias = self._take_bias(name, module)
                yield partial(self._linear, form, bias, module.bias is not None)

    def _take_bias(self, name: str, module: nn.Linear) -> str | None:
        bias = f"{name}.bias"
        # AutoGPTQ writes biases, of zeros, even where the model has none
        if module.bias is None and bias not in self.inventory:
            return None
        return self.inventory.take([bias], (module.out_features,))

    def _linear(self, form: LinearFormat, bias_name: str | None, has_bias: bool) -> None:
        bias = None
        if bias_name is not None:
            shard = self.inventory.shard(bias_name)
            bias = install.read_plain(shard, bias_name, self._dtype(bias_name, shard.tensors[bias_name].dtype))
            if not has_bias and not bool(bias.any()):
                bias = None
        assert self.settings is not None
        source = GptqSource(form, self.settings, form.column_order())
        self._put(form.name, install.read_linear(source, bias, self._take))

    # -- experts -------------------------------------------------------------------------------------------------------

    def _experts_jobs(self, site: ExpertsSite) -> Iterator[Job]:
        gate_up, down = fused_names(site)
        count, wide, inner = (*self._state[down],)
        sizes = ((inner, wide), (inner, wide), (wide, inner))
        names = [
            [expert_name(site.name, site.spec, e, proj) for proj in expert_projections(self.family.mlp)]
            for e in range(count)
        ]
        every = [(name, size) for expert in names for name, size in zip(expert, sizes, strict=True)]
        if any(f"{name}.qweight" in self.inventory for name, _ in every):
            self._claim(gate_up, down)
            forms = [self._expert_form(name, size) for name, size in every]
            yield partial(self._quantized_experts, site, [f for f in forms if f is not None])
        elif gate_up not in self.inventory:
            self._claim(gate_up, down)
            for name, size in every:
                self.inventory.take([f"{name}.weight"], size)
            yield partial(self._plain_experts, site, names)

    def _expert_form(self, name: str, size: tuple[int, int]) -> LinearFormat | None:
        if f"{name}.qweight" not in self.inventory:
            self.inventory.lacks(f"{name}.qweight")
            return None
        if f"{name}.bias" in self.inventory:
            self.inventory.take([f"{name}.bias"], size[:1])
        return self.inventory.gptq(name, self.settings, size)

    def _quantized_experts(self, site: ExpertsSite, forms: list[LinearFormat]) -> None:
        settings = self.settings
        assert settings is not None
        for form in forms:
            self._check_no_bias(form)
        orders = [form.column_order() for form in forms]
        fused = (
            all(order is None for order in orders)
            and {form.bits for form in forms} == {4}
            and len({kernel_settings(form.group_size)[0] for form in forms}) == 1
        )
        # one layout for all: where symmetry is a matter of each expert, all keep their zero points
        keep_zeros = fused and (settings.has_overrides or settings.symmetric is None)

        def linears(expert: int) -> list[GptqSource]:
            part = slice(3 * expert, 3 * expert + 3)
            return [
                GptqSource(form, settings, order, keep_zeros=keep_zeros)
                for form, order in zip(forms[part], orders[part], strict=True)
            ]

        count = len(forms) // 3
        if not fused:
            _log.warning(
                "%s: activation order or mixed settings: experts run one by one, not fused (same results, slower)",
                site.name,
            )
        read = install.fuse_experts if fused else install.separate_experts
        self._put(site.name, read(linears, count, self._take))

    def _check_no_bias(self, form: LinearFormat) -> None:
        name = f"{form.name}.bias"
        if name in self.inventory and bool(self.inventory.shard(name).read(name).any()):
            path = self.inventory.shard(name).path
            raise CheckpointError(f"{path}: {name}: expected zeros (the experts have no bias), got other values")

    def _plain_experts(self, site: ExpertsSite, names: list[list[str]]) -> None:
        gate_up, down = fused_names(site)
        first = f"{names[0][0]}.weight"
        dtype = self._dtype(gate_up, self.inventory.info(first).dtype)
        wide, low = (torch.empty(self._state[name], dtype=dtype) for name in (gate_up, down))
        inner = wide.shape[1] // 2
        for expert, linears in enumerate(names):
            targets = (wide[expert, :inner], wide[expert, inner:], low[expert])
            for name, target in zip(linears, targets, strict=True):
                shard = self.inventory.shard(f"{name}.weight")
                target.copy_(install.checked(shard, f"{name}.weight", shard.read(f"{name}.weight")))
        self._put(gate_up, wide)
        self._put(down, low)

    # -- head and embedding --------------------------------------------------------------------------------------------

    def _requantized_jobs(self) -> Iterator[Job]:
        records = self.manifest.requantized if self.manifest is not None else {}
        kinds = {self.family.embedding: "embedding", self.family.head: "linear"}
        path = self.files.directory / MANIFEST
        for name, record in records.items():
            if kinds.get(name) != record.kind:
                raise CheckpointError(f"{path}: requantized: {name}: expected {kinds}, got kind {record.kind!r}")
            if self.scales is None:
                raise CheckpointError(f"{self.files.directory}: {SCALES}: missing, and {name} needs it")
            module = self.model.get_submodule(name)
            shape = self._state[f"{name}.weight"]
            found = self.inventory.take([record.tensor], shape)
            self._claim(f"{name}.weight")
            if found is not None:
                grid = install.read_grid(self.scales, record, *shape)
                if record.scales == name:
                    self._packed_bytes += math.prod(requantize.packed_shape(grid))
                yield partial(self._requantized, name, module, record, grid, found)

    def _requantized(self, name: str, module: nn.Module, record: Requantized, grid: Grid, found: str) -> None:
        key = (record.tensor, record.scales, record.bits, record.sha256)
        if key not in self._packed:
            shard = self.inventory.shard(found)
            packed = install.requantized_bytes(shard, found, grid, self._take)
            assert self._checks is not None
            self._checks.packed(f"{shard.path}: {found}", packed, record)
            self._packed[key] = packed.to(self.device)
        packed = self._packed[key]
        if isinstance(module, nn.Linear):
            self._put(name, install.requantized_linear(packed, module, record, grid.perm))
            return
        assert isinstance(module, nn.Embedding)
        dtype = self.dtype or DTYPE_NAMES[record.dtype]
        table = QuantEmbedding(
            packed, num_embeddings=grid.out_features, embedding_dim=grid.in_features, bits=record.bits,
            group_size=grid.kernel_group, dtype=dtype, padding_idx=module.padding_idx,
        )  # fmt: skip
        self._put(name, table)

    def _head_jobs(self) -> Iterator[Job]:
        """A tied head that is not stored: the embedding's weight, or its tensor where only the embedding is packed."""
        head, table = f"{self.family.head}.weight", f"{self.family.embedding}.weight"
        if not self.tied or head not in self._todo:
            return
        self._claim(head)
        if head in self.inventory:
            self.inventory.take([head], self._state[head])
            yield partial(self._check_tied, head, table)
        if table in self._todo:
            self._tie_head = True
        else:
            self.inventory.take([table], self._state[head])
            yield partial(self._plain, head, table)

    def _check_tied(self, head: str, table: str) -> None:
        one, other = self.inventory.shard(head), self.inventory.shard(table)
        if not install.same_values((one, head), (other, table)):
            raise CheckpointError(
                f"{one.path}: {head}: expected the values of {table} (tie_word_embeddings is true), got others"
            )


def _extra_layers(config: Any) -> int:
    count = getattr(config, "num_nextn_predict_layers", 0)
    return count if type(count) is int and 0 < count <= _MAX_EXTRA_LAYERS else 0
