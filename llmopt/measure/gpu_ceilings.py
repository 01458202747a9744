"""What a GPU can do at most, by torch: the read bandwidth as the sum of a large tensor, bfloat16 as a large product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llmopt.measure.ceilings import CeilingMeter, Kind
from llmopt.measure.report import Ceilings

_READ_BYTES = 2 << 30  # large against the L2
_SIDE = 8192
_SECONDS = 0.04


class GpuMeter(CeilingMeter):
    """Gathers a GPU's ceilings round by round, as :class:`~llmopt.measure.ceilings.CeilingMeter` does a processor's.

    Args:
        device: the GPU; 2.5 GiB of its memory are held until ``close``.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(kinds=("read_gb_per_s", "bf16_tflops"))
        self._device = device
        self._runs: dict[Kind, tuple[float, Callable[[], object]]] = {}

    def measure_round(self) -> dict[Kind, float]:
        """Measure each kind once, for some 40 ms, and keep it. What memory is short for is left out, see ``unavailable``."""
        if self.unavailable:
            return {}
        try:
            self._runs = self._runs or self._make()
        except torch.OutOfMemoryError as error:
            self.unavailable |= dict.fromkeys(self.kinds, str(error).split(".")[0])
            return {}
        measured = {kind: amount / self._seconds(run) for kind, (amount, run) in self._runs.items()}
        for kind, value in measured.items():
            self.samples.setdefault(kind, []).append(value)
        return measured

    def result(self) -> Ceilings:
        """What was gathered, for the receipt."""
        read, product = self.interval("read_gb_per_s"), self.interval("bf16_tflops")
        return Ceilings(read_gb_per_s=read, bf16_tflops=product, isa=torch.cuda.get_device_name(self._device))

    def close(self) -> None:
        """Give the memory back; the samples stay."""
        self._runs = {}

    def _make(self) -> dict[Kind, tuple[float, Callable[[], object]]]:
        """Of each kind an amount, in its unit times seconds, and what does it."""
        # of random numbers: a GPU runs faster on constant ones
        data = torch.rand(_READ_BYTES // 4, device=self._device)
        a = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=self._device)
        out = torch.empty_like(a)
        return {
            "read_gb_per_s": (data.nbytes / 1e9, data.sum),
            "bf16_tflops": (2 * _SIDE**3 / 1e12, lambda: torch.mm(a, a, out=out)),
        }

    def _seconds(self, run: Callable[[], object]) -> float:
        """Of one call, the mean of as many as fit."""
        self._calls(run, 1)
        count = max(1, int(_SECONDS / max(self._calls(run, 1), 1e-6)))
        return self._calls(run, count) / count

    def _calls(self, run: Callable[[], object], count: int) -> float:
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - began
