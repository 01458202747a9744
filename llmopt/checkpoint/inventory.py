"""A checkpoint's tensors, ticked off against what the model needs, from the headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from llmopt.checkpoint import gptq_format
from llmopt.checkpoint.gptq_source import LinearFormat
from llmopt.checkpoint.quant_config import Settings
from llmopt.checkpoint.safety import CheckpointFiles, nearest
from llmopt.checkpoint.shard_reader import Shard, TensorInfo
from llmopt.errors import CheckpointError
from llmopt.models.base import FLOAT_DTYPES

_SHOWN = 5


class Inventory:
    """Every tensor of the files; those that the model takes are marked used, those it lacks are gathered."""

    def __init__(self, files: CheckpointFiles) -> None:
        self.owner = files.owner
        self._directory = files.directory
        self._used: set[str] = set()
        self._missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.owner

    def shard(self, name: str) -> Shard:
        return self.owner[name]

    def info(self, name: str) -> TensorInfo:
        return self.owner[name].tensors[name]

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        shards = {shard.path: shard for shard in self.owner.values()}
        return sum(info.stop - info.start for shard in shards.values() for info in shard.tensors.values())

    def use(self, name: str) -> None:
        self._used.add(name)

    def lacks(self, name: str) -> None:
        """Note a tensor as missing."""
        self._missing.append(name)

    def take(
        self, names: Sequence[str], shape: tuple[int, ...], dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
    ) -> str | None:
        """The first of the names that is there, checked and marked used; None (and noted as missing) if none is.

        Raises:
            CheckpointError: shape or dtype differ from what the config asks for.
        """
        name = next((n for n in names if n in self.owner), None)
        if name is None:
            self.lacks(names[0])
            return None
        info = self.info(name)
        where = f"{self.shard(name).path}: {name}"
        if info.shape != shape:
            raise CheckpointError(f"{where}: expected shape {list(shape)} (from the config), got {list(info.shape)}")
        if info.dtype not in dtypes:
            expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(f"{where}: expected {expected}, got {str(info.dtype).removeprefix('torch.')}")
        self.use(name)
        return name

    def finish(self, ignorable: Iterable[str]) -> None:
        """All that the model needs has been asked for.

        Args:
            ignorable: regular expressions for tensors that the model's class says it does not need.

        Raises:
            CheckpointError: tensors are missing, or there are some that nothing uses; with the nearest names.
        """
        patterns = [re.compile(pattern) for pattern in ignorable]
        left = [n for n in self.owner if n not in self._used and not any(p.search(n) for p in patterns)]
        if not self._missing and not left:
            return
        lines = []
        if self._missing:
            shown = [f"  {n}{nearest(n, left or self.owner)}" for n in self._missing[:_SHOWN]]
            lines += [f"expected {len(self._missing)} more tensors:", *shown, _more(self._missing)]
        if left:
            shown = [f"  {n}{nearest(n, self._missing)}" for n in left[:_SHOWN]]
            lines += [f"{len(left)} tensors belong to nothing in the model:", *shown, _more(left)]
        raise CheckpointError(f"{self._directory}: " + "\n".join(line for line in lines if line))

    def gptq(self, name: str, settings: Settings | None, sizes: tuple[int, int]) -> LinearFormat:
        """How the quantized linear ``name`` of sizes ``(N, K)`` is written, its tensors checked.

        Raises:
            CheckpointError: the tensors do not fit each other, the sizes or the settings.
        """
        n, k = sizes
        if settings is None:
            path = self.shard(f"{name}.qweight").path
            raise CheckpointError(f"{path}: {name}.qweight: quantized, but config.json has no quantization_config")
        bits = self._bits(name, settings, n, k)
        group_size = self._group_size(name, settings, k)
        shapes = gptq_format.shapes(n, k, 1 if group_size == -1 else -(-k // group_size), bits)
        self.take([f"{name}.qweight"], shapes["qweight"], (torch.int32,))
        self.take([f"{name}.scales"], shapes["scales"])
        self.take([f"{name}.qzeros"], shapes["qzeros"], (torch.int32,))
        # files from before activation order have none
        if f"{name}.g_idx" in self:
            self.take([f"{name}.g_idx"], shapes["g_idx"], (torch.int32, torch.int64))
        return LinearFormat(name, n, k, bits, group_size, self.owner)

    def _bits(self, name: str, settings: Settings, n: int, k: int) -> int:
        """The configured bits; where modules may differ, what the packed length says."""
        if not settings.has_overrides:
            return settings.bits
        shape = self.info(f"{name}.qweight").shape
        fits = [b for b in (settings.bits, *gptq_format.BITS) if shape == (gptq_format.words(k, b), n)]
        return fits[0] if fits else settings.bits

    def _group_size(self, name: str, settings: Settings, k: int) -> int:
        if not settings.has_overrides or f"{name}.scales" not in self:
            return settings.group_size
        groups = self.info(f"{name}.scales").shape[:1]
        fits = [g for g in settings.group_sizes() if groups == (1 if g == -1 else -(-k // g),)]
        return fits[0] if fits else settings.group_size


def _more(names: Sequence[str]) -> str:
    return f"  and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
