"""Keeps what an optimized model no longer needs, so that ``restore`` can give it back bit by bit.

Replaced weights are as large as the model was. Once measuring is over they move to a temporary file and leave memory;
``restore`` reads them back. Small models, and machines without room on disk, keep them in memory (and the receipt says so).
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from llmopt.errors import CheckpointError
from llmopt.passes.base import Patch

# below this a file is not worth it
_SMALL_BYTES = 64 << 20


class Originals:
    """The weights that enabled patches have taken out of a model."""

    def __init__(self, model: nn.Module, patches: Iterable[Patch]) -> None:
        live = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        replaced = [s.before for p in patches for s in p.swaps if isinstance(s.before, nn.Module | nn.Parameter)]
        self.tensors: dict[int, nn.Parameter] = {}
        self._strides: dict[int, tuple[int, ...]] = {}
        for item in replaced:
            for parameter in [item] if isinstance(item, nn.Parameter) else item.parameters():
                storage = parameter.untyped_storage()
                # a view of a larger storage frees nothing, and must stay a view
                alone = storage.nbytes() == parameter.numel() * parameter.element_size()
                if alone and storage.data_ptr() not in live:
                    self.tensors[id(parameter)] = parameter
        self.num_bytes = sum(p.numel() * p.element_size() for p in self.tensors.values())
        self.where = "memory"
        self._file: Path | None = None
        self._finalizer: Any = None

    def spill(self) -> str:
        """Move the tensors to disk if that is worth it and possible. Returns a line for the receipt."""
        if self.num_bytes < _SMALL_BYTES:
            return f"original weights ({self.num_bytes / 1e6:.0f} MB) stay in memory for restore()"
        room = shutil.disk_usage(tempfile.gettempdir()).free
        if room < 1.1 * self.num_bytes:
            return (
                f"original weights ({self.num_bytes / 1e9:.2f} GB) stay in memory for restore(): "
                f"only {room / 1e9:.2f} GB free in {tempfile.gettempdir()}"
            )
        folder = Path(tempfile.mkdtemp(prefix="llmopt-originals-"))
        # a model that is dropped takes its file along
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = folder / "originals.safetensors"
        try:
            save_file({str(k): p.detach().contiguous() for k, p in self.tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            self._finalizer()
            return f"original weights ({self.num_bytes / 1e9:.2f} GB) stay in memory for restore(): {error}"
        for key, parameter in self.tensors.items():
            self._strides[key] = parameter.stride()
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self._file, self.where = path, "disk"
        return f"original weights ({self.num_bytes / 1e9:.2f} GB) wait on disk for restore(), out of memory"

    def bring_back(self) -> None:
        """Put every tensor back where it was.

        Raises:
            CheckpointError: the file is gone or damaged; nothing has been changed.
        """
        if self._file is None:
            return
        try:
            with safe_open(str(self._file), framework="pt") as file:
                values = {key: file.get_tensor(str(key)) for key in self.tensors}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._file}: the original weights cannot be read back: {error}") from None
        for key, parameter in self.tensors.items():
            # strides too: products of the same numbers laid out otherwise differ in their last bits
            value = values[key]
            parameter.data = torch.empty_strided(
                value.shape, self._strides[key], dtype=value.dtype, device=parameter.device
            ).copy_(value)
        self._finalizer()
        self._file, self.where = None, "memory"

    def tensor(self, parameter: nn.Parameter) -> torch.Tensor:
        """One original, wherever it is."""
        if self._file is None or id(parameter) not in self.tensors:
            return parameter.detach()
        with safe_open(str(self._file), framework="pt") as file:
            value: torch.Tensor = file.get_tensor(str(id(parameter)))
            return value
