"""What this machine can do at most, measured on the threads the kernels use, in the rounds of what it is compared with.

A ceiling measured an hour ago, or read from a data sheet, says little: on shared machines the read bandwidth drifts by
a factor of two. So ``CeilingMeter.measure_round`` takes some tens of milliseconds a kind, to be called in each round.

=============== ======================================================================= =========================
kind            what runs                                                               unit
=============== ======================================================================= =========================
read_gb_per_s   every thread streams its share of a buffer large against the L3, in     10^9 bytes per second
                huge pages as weights lie, after one pass that is not timed
int8_tops       tdpbssd (AMX); vpdpbusd (AVX-512 VNNI); vpmaddubsw chain for 4-bit      10^12 operations per second
                weights (AVX2); plain loop over int16 (portable), in registers or L1    (a multiply-add is two)
bf16_tflops     tdpbf16ps (AMX); vdpbf16ps, where the processor has AVX512_BF16         10^12 operations per second
fp32_tflops     fused multiply-add, or multiply and add on portable                     10^12 operations per second
=============== ======================================================================= =========================

The compute kinds are of the instruction set in force (``native.active_isa``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from llmopt import native
from llmopt.errors import InputError, LlmoptError, NativeLibraryError
from llmopt.measure import environment, memory
from llmopt.measure.report import Ceilings, Interval
from llmopt.measure.stats import interval

Kind = Literal["read_gb_per_s", "int8_tops", "bf16_tflops", "fp32_tflops"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_COMPUTE: dict[Kind, str] = {"int8_tops": "int8", "bf16_tflops": "bf16", "fp32_tflops": "fp32"}
_READ_MS, _COMPUTE_MS = 100.0, 40.0
_LEAST_BUFFER = 64 << 20
_USUAL_BUFFER = 1 << 30


class CeilingUnavailableError(LlmoptError, RuntimeError):
    """This ceiling cannot be measured here; the message says why."""


class ReadBuffer:
    """Memory to stream: 1 GiB, or twice the L3 where that is more, but never more than a quarter of what is available.

    Filling it takes about a second, so one is made once and used for all rounds. ``release`` gives it back.

    Raises:
        CeilingUnavailableError: less than 64 MiB could be taken.
        NativeLibraryError: there are no compiled kernels.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        library = native.library()
        from llmopt.arena import huge_block

        self.num_bytes = num_bytes if num_bytes is not None else _buffer_bytes()
        self._tensor: Any = huge_block(self.num_bytes)  # as packed weights lie
        library.ceiling_touch(self._tensor)

    def read(self, milliseconds: float) -> float:
        """Stream it for that long, all of it at least once; GB/s."""
        return float(native.library().ceiling_read(self._tensor, milliseconds))

    def release(self) -> None:
        self._tensor = None


def _buffer_bytes() -> int:
    wanted = max(_USUAL_BUFFER, 2 * (environment.l3_bytes() or 0))
    available = memory.available_bytes()
    size = wanted if available is None else min(wanted, available // 4)
    if size < _LEAST_BUFFER:
        raise CeilingUnavailableError(f"read bandwidth: needs {_LEAST_BUFFER >> 20} MiB, {size >> 20} MiB can be taken")
    return size


def threads() -> int:
    """Threads the kernels, and so these measurements, run on."""
    return int(native.library().ceiling_threads())


def measure_once(kind: Kind, *, buffer: ReadBuffer | None = None, milliseconds: float | None = None) -> float:
    """Measure one ceiling once: about 100 ms for reading, 40 ms for computing.

    Args:
        kind: one of ``KINDS``; its unit is in its name.
        buffer: what to stream for ``read_gb_per_s``; one is made and released if none is given, which takes a second.
        milliseconds: another duration.

    Raises:
        InputError: unknown kind.
        CeilingUnavailableError: this processor has no such instruction, or memory is short.
        NativeLibraryError: there are no compiled kernels.
    """
    if kind not in KINDS:
        raise InputError.argument("kind", expected=" | ".join(KINDS), got=kind)
    if kind == "read_gb_per_s":
        if buffer is not None:
            return buffer.read(_READ_MS if milliseconds is None else milliseconds)
        own = ReadBuffer()
        try:
            return own.read(_READ_MS if milliseconds is None else milliseconds)
        finally:
            own.release()
    rate = float(
        native.library().ceiling_compute(_COMPUTE[kind], _COMPUTE_MS if milliseconds is None else milliseconds)
    )
    if rate == 0.0:
        raise CeilingUnavailableError(f"{kind}: no such instruction in {native.active_isa()} on this processor")
    return rate


@dataclass
class CeilingMeter:
    """Gathers the ceilings round by round; ``result`` gives medians with 95% intervals.

    Use it as a context manager, or call ``close``: it holds a buffer of about 1 GiB from the first round on.
    """

    kinds: Sequence[Kind] = ("read_gb_per_s", "int8_tops", "bf16_tflops")
    samples: dict[Kind, list[float]] = field(default_factory=dict)
    unavailable: dict[Kind, str] = field(default_factory=dict)  # kind -> why it is not measured
    _buffer: ReadBuffer | None = None

    def measure_round(self) -> dict[Kind, float]:
        """Measure each kind once, and keep it. Kinds that cannot be measured are left out, see ``unavailable``."""
        measured: dict[Kind, float] = {}
        for kind in self.kinds:
            if kind in self.unavailable:
                continue
            try:
                if kind == "read_gb_per_s" and self._buffer is None:
                    self._buffer = ReadBuffer()
                measured[kind] = measure_once(kind, buffer=self._buffer)
            except (CeilingUnavailableError, NativeLibraryError) as error:
                self.unavailable[kind] = str(error)
                continue
            self.samples.setdefault(kind, []).append(measured[kind])
        return measured

    def interval(self, kind: Kind) -> Interval | None:
        """Median over the rounds and its 95% interval, or None where nothing was measured."""
        samples = self.samples.get(kind)
        return interval(samples) if samples else None

    def result(self) -> Ceilings:
        """What was gathered, for the receipt."""
        return Ceilings(
            read_gb_per_s=self.interval("read_gb_per_s"),
            int8_tops=self.interval("int8_tops"),
            bf16_tflops=self.interval("bf16_tflops"),
            fp32_tflops=self.interval("fp32_tflops"),
            isa=native.active_isa() if self.samples else "",
            threads=threads() if self.samples else 0,
        )

    def close(self) -> None:
        """Give the buffer back; the samples stay."""
        if self._buffer is not None:
            self._buffer.release()
            self._buffer = None

    def __enter__(self) -> CeilingMeter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def meter_for(device: torch.device) -> CeilingMeter | None:
    """A meter for the device that a model runs on; None where none can measure it."""
    if device.type == "cuda":
        from llmopt.measure.gpu_ceilings import GpuMeter

        return GpuMeter(device)
    return usable_meter() if device.type == "cpu" else None


def usable_meter() -> CeilingMeter | None:
    """A meter, or None without the compiled kernels, which are what it measures with."""
    return CeilingMeter() if native.available() else None
