"""Decoding that does not wait for the GPU: steps are launched before the tokens of the steps before have been read.

A step chooses its next tokens on the device, the largest or drawn ones, and goes on from them, so the host is not needed to
begin another. It reads tokens some steps later, through pinned memory and on a stream of their own, and finds out then that a
sequence has ended: what was launched beyond is not used, its places in the cache are written again, and the generator is put
back. Some steps may still run when ``generate`` returns: who goes on with the same cache on another stream has to wait for this
one.
"""

from __future__ import annotations

from collections import deque

import torch

from llmopt.runtime.sampling import drawn
from llmopt.runtime.step import DecodeStep

# kinds of devices that run while the host goes on
AHEAD = {"cuda"}
# steps launched and not read yet: what the host does for one token may take as long as so many steps less one
MOST_IN_FLIGHT = 4


class Ahead:
    """Runs a step ahead of who reads its tokens.

    Args:
        step: placed behind the tokens that its cache holds; its program is launched by nobody else meanwhile.
        tokens: ``[S]`` int64 on the CPU, to decode next.
    """

    def __init__(self, step: DecodeStep, tokens: torch.Tensor) -> None:
        self._step = step
        step.ids.copy_(tokens)
        self._ring = _Ring(step.chosen, MOST_IN_FLIGHT)
        # places, and where the generator stood before those tokens were drawn
        self._flying: deque[tuple[int, torch.Tensor | None]] = deque()
        self._launched = 0

    def next(self, most: int) -> torch.Tensor:
        """The tokens that follow, ``[S]`` int64 on the CPU.

        Args:
            most: steps that there is room for from the first one not read yet, at least 1.

        Raises:
            RuntimeError: no token can be drawn, for logits are not finite.
        """
        step = self._step
        while len(self._flying) < min(MOST_IN_FLIGHT, most):
            state = None if step.sampling is None else step.sampling.state()
            step.run()
            place = self._launched % MOST_IN_FLIGHT
            self._ring.put(place, step.chosen)
            self._flying.append((place, state))
            self._launched += 1
        return drawn(self._ring.get(self._flying.popleft()[0]))

    def end(self) -> None:
        """Nobody reads further: the generator is put back to where it would stand without the steps in flight."""
        state = self._flying[0][1] if self._flying else None
        if state is not None and self._step.sampling is not None:
            self._step.sampling.restore(state)
        self._flying.clear()


class _Ring:
    """Copies of a small tensor on their way to the host, each in a place of its own."""

    def __init__(self, like: torch.Tensor, places: int) -> None:
        self._kept = torch.empty(places, *like.shape, dtype=like.dtype, device=like.device)
        self._gpu = _on_gpu(like)
        if not self._gpu:
            return
        self._host = torch.empty(self._kept.shape, dtype=like.dtype, pin_memory=True)
        self._side = torch.cuda.Stream(like.device)
        self._kept.record_stream(self._side)
        self._made, self._there = ([torch.cuda.Event() for _ in range(places)] for _ in range(2))

    def put(self, place: int, value: torch.Tensor) -> None:
        """Send a copy; what was in that place has been got."""
        self._kept[place].copy_(value)
        if not self._gpu:
            return
        # the next step does not wait for the copy to the host
        self._made[place].record(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._made[place])
            self._host[place].copy_(self._kept[place], non_blocking=True)
            self._there[place].record(self._side)

    def get(self, place: int) -> torch.Tensor:
        """That copy, when it has arrived, on the CPU."""
        if not self._gpu:
            return self._kept[place].clone()
        self._there[place].synchronize()
        return self._host[place].clone()


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
