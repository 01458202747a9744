"""What a decode step consists of, made once and run again as one: op calls on the CPU, or a CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmopt import native
from llmopt.ops.device import by_triton
from llmopt.runtime.pools import CAPTURING, GraphMemory, capturing

if TYPE_CHECKING:
    from llmopt.runtime.step import DecodeStep

# runs before a graph is captured: the first compiles kernels, the second finds whatever the first has kept
_WARM_UP = 2


class Recorded(Protocol):
    """A step that can be run."""

    def run(self, times: int = 1) -> None:
        """Run it, several times if asked."""


def only_ops() -> bool:
    """True where nothing of torch's may stand in for an op: a program is recorded on this thread, or a graph is traced."""
    return torch.compiler.is_compiling() or (native.available() and bool(native.library().recording()))


def recorded(step: DecodeStep, graphs: GraphMemory | None) -> Recorded:
    """A step's calls for its device: on the CPU a program of ops, on a GPU a CUDA graph, or the calls themselves.

    Args:
        step: made but for this.
        graphs: where graphs lie; None: no graph.
    """
    if not by_triton(step.ids):
        return Program(step.make_calls)
    return Calls(step) if graphs is None or not step.ids.is_cuda else GraphProgram(step, graphs)


class Program:
    """Op calls with their tensors, to be run again and again.

    A run reads and writes the tensors that were given when it was recorded: what changes from run to run is changed in them.
    The GIL is released meanwhile. Programs of one process run one at a time: concurrent callers take turns, a run each.

    Args:
        calls: makes the op calls, once; only ops of the engine, nothing of torch's. What it returns is kept.
        keep: whatever else holds the tensors alive.
    """

    def __init__(self, calls: Callable[[], object], keep: Any = None) -> None:
        library = native.library()
        library.record_begin()
        try:
            made = calls()
        except BaseException:
            library.record_abort()
            raise
        ended = library.record_end()
        self._run, self._profile = ended["run"], ended["profile"]
        self._keep = keep, made

    def run(self, times: int = 1) -> None:
        """Run it, several times if asked."""
        self._run(times)

    def profile(self, times: int = 1) -> list[tuple[str, float]]:
        """Run it, and tell where the time goes: every call in order, its op and its seconds, the mean of all runs.

        A call's time ends when all threads have done their share.
        """
        return [(str(name), float(seconds)) for name, seconds in self._profile(times)]


class Calls:
    """The calls themselves, made anew by every run."""

    def __init__(self, step: DecodeStep) -> None:
        # the step holds this: held back, its cache would wait for the collector
        self._step = weakref.ref(step)

    def run(self, times: int = 1) -> None:
        """Run it, several times if asked."""
        step = self._step()
        assert step is not None
        for _ in range(times):
            step.make_calls()


class GraphProgram:
    """A step captured as a CUDA graph: one launch a token, whatever it consists of.

    Sequences, positions and slots are read on the GPU, so that one graph serves every token. Graphs are launched on the stream
    that is current; the counters of split attention allow one such stream at a time.

    Args:
        step: its tensors are those of the graph; what it holds is as before when this returns, its cache's last slots aside,
            which are behind all that is filled.
        graphs: where it lies.
    """

    def __init__(self, step: DecodeStep, graphs: GraphMemory) -> None:
        self._device = step.ids.device
        changed = (step.ids, step.rows.position, step.rows.slot)
        # one capture of a process at a time; calls of other threads that allocate do not disturb it
        with CAPTURING, torch.cuda.device(self._device):
            before = [tensor.clone() for tensor in changed]
            # kernels are compiled and their choices made out of the graph's sight, where no token will be missed; on the
            # stream of the steps, for the counters are theirs
            for _ in range(_WARM_UP):
                step.to_last_slots()
                step.make_calls()
            self._graph = torch.cuda.CUDAGraph()
            mode = "relaxed" if graphs.others_allocate else "thread_local"
            with capturing(), torch.cuda.graph(self._graph, pool=graphs.pool(), capture_error_mode=mode):
                self._keep = step.make_calls()
            graphs.lives(self)
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(old)

    def run(self, times: int = 1) -> None:
        """Launch it, several times if asked; returns before it has run."""
        with torch.cuda.device(self._device):
            for _ in range(times):
                self._graph.replay()
