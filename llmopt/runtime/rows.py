"""Rows: the tokens of a forward pass, each with its place in the cache and its rope position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Rows:
    """Tokens of any sequences. Those of one sequence stand together, in order.

    Attributes:
        position: ``[T]`` int32, for the rotary embedding.
        seq: ``[T]`` int32, the cache's sequence.
        slot: ``[T]`` int32, the place in that sequence.
    """

    position: torch.Tensor
    seq: torch.Tensor
    slot: torch.Tensor
    _runs: list[tuple[slice, int, int]] | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.seq)

    def chunks(self, size: int) -> Iterator[tuple[slice, Rows]]:
        """Pieces of up to ``size`` tokens, in order."""
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            yield part, Rows(self.position[part], self.seq[part], self.slot[part])

    def runs(self) -> list[tuple[slice, int, int]]:
        """Rows of one sequence that follow each other: ``(rows, sequence, slot of the last)``.

        Read from the device once, for all layers: of rows that nobody changes in place.
        """
        if self._runs is not None:
            return self._runs
        seq, slot = self.seq.tolist(), self.slot.tolist()
        found: list[tuple[slice, int, int]] = []
        first = 0
        for i in range(1, len(seq) + 1):
            if i == len(seq) or seq[i] != seq[first] or slot[i] != slot[i - 1] + 1:
                found.append((slice(first, i), seq[first], slot[i - 1]))
                first = i
        self._runs = found
        return found

    def longest_run(self) -> int:
        """Tokens of the longest run."""
        return max((part.stop - part.start for part, _, _ in self.runs()), default=0)

    @staticmethod
    def of_batch(
        batch: int, tokens: int, past: int, position_ids: torch.Tensor | None, keep: torch.Tensor | None,
        device: torch.device,
    ) -> Rows:  # fmt: skip
        """Rows of ``[batch, tokens]`` new tokens behind ``past`` slots.

        Args:
            batch, tokens: the shape.
            past: slots filled before.
            position_ids: ``[batch or 1, tokens]``, or None: the slots.
            keep: ``[batch, tokens]`` bool, tokens that are no padding, or None: all.
            device: of the rows, and of all that is given.
        """
        slot = torch.arange(past, past + tokens, dtype=torch.int32, device=device).expand(batch, tokens)
        seq = torch.arange(batch, dtype=torch.int32, device=device)[:, None].expand(batch, tokens)
        position = slot if position_ids is None else position_ids.to(torch.int32).expand(batch, tokens)
        parts = (position, seq, slot) if keep is None else (position[keep], seq[keep], slot[keep])
        return Rows(*(x.reshape(-1).contiguous() for x in parts))
