"""Hashes that are compared on a thread of their own, beside the loading: they take as long as all the rest."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from llmopt.checkpoint.manifest import MANIFEST, SCALES, FileRecord, Requantized
from llmopt.checkpoint.requantize import sha256
from llmopt.errors import CheckpointError

_BLOCK = 2**22


class HashChecks:
    """A context: what has been asked for is compared by its end, and the first difference is an error there.

    A difference is worth more than what follows from it: it takes the place of a CheckpointError raised inside.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "llmopt-hashes")
        self._started: list[Future[None]] = []
        self._stopped = False

    def file(self, path: Path, record: FileRecord) -> None:
        """Compare a file with what was recorded when it was written."""
        self._started.append(self._pool.submit(self._file, path, record))

    def packed(self, where: str, packed: torch.Tensor, record: Requantized) -> None:
        """Compare bytes that were quantized again with those that were saved; ``where`` names file and tensor."""
        self._started.append(self._pool.submit(_packed, where, packed, record))

    def __enter__(self) -> HashChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = kind is not None and not issubclass(kind, CheckpointError)
        self._pool.shutdown(cancel_futures=self._stopped)
        for future in () if self._stopped else self._started:
            future.result()

    def _file(self, path: Path, record: FileRecord) -> None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not self._stopped and (block := file.read(_BLOCK)):
                digest.update(block)
        if digest.hexdigest() != record.sha256:
            raise CheckpointError(
                f"{path}: expected sha256 {record.sha256[:12]}... ({MANIFEST}), got {digest.hexdigest()[:12]}...: "
                "the file was damaged or changed after it was saved"
            )


def _packed(where: str, packed: torch.Tensor, record: Requantized) -> None:
    if sha256(packed) != record.sha256:
        raise CheckpointError(
            f"{where}: quantized again with {SCALES}, expected the bytes recorded in {MANIFEST} "
            f"(sha256 {record.sha256[:12]}...), got others"
        )
