"""Ceilings: plausible, ordered as instruction sets are, gathered by rounds, and absent with a reason."""

from __future__ import annotations

import pytest
import torch

from llmopt import native
from llmopt.errors import InputError, NativeLibraryError
from llmopt.measure import ceilings, environment, memory
from llmopt.measure.ceilings import KINDS, CeilingMeter, CeilingUnavailableError, ReadBuffer, measure_once

needs_kernels = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
MIB = 1 << 20


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB are enough where no figure is looked at."""
    monkeypatch.setattr(ceilings, "_buffer_bytes", lambda: 64 * MIB)


@needs_kernels
@pytest.mark.usefixtures("small_buffer")
def test_read_bandwidth_is_plausible() -> None:
    assert 0.1 < measure_once("read_gb_per_s", milliseconds=20) < 10_000


def test_compute_kinds_follow_the_isa_in_force(isa: str) -> None:
    for kind in ("int8_tops", "fp32_tflops"):
        assert 1e-4 < measure_once(kind, milliseconds=5) < 1e3
    if isa not in ("avx512", "amx") or "avx512_bf16" not in environment.cpu()["isa"]:
        with pytest.raises(CeilingUnavailableError, match="bf16_tflops"):
            measure_once("bf16_tflops", milliseconds=5)
    else:
        assert measure_once("bf16_tflops", milliseconds=5) > 1e-4


@needs_kernels
@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("kind", ["read_gb_per_s", "int8_tops", "fp32_tflops"])
def test_a_duration_that_is_over_before_the_threads_wake_still_measures(kind: ceilings.Kind) -> None:
    assert measure_once(kind, milliseconds=1e-6) > 0


@needs_kernels
def test_threads_are_torchs_threads() -> None:
    before = torch.get_num_threads()
    try:
        for wanted in (1, 2):
            torch.set_num_threads(wanted)
            assert ceilings.threads() == wanted
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.usefixtures("small_buffer")
def test_meter_gathers_rounds_and_gives_its_buffer_back() -> None:
    with CeilingMeter(KINDS) as meter:
        for _ in range(3):
            measured = meter.measure_round()
            assert meter._buffer is not None
            assert set(measured) | set(meter.unavailable) == set(KINDS)
    assert meter._buffer is None
    result = meter.result()
    assert result.read_gb_per_s is not None
    assert result.read_gb_per_s.rounds == 3
    assert result.read_gb_per_s.low <= result.read_gb_per_s.value <= result.read_gb_per_s.high
    assert result.threads == torch.get_num_threads()
    assert (result.bf16_tflops is None) == ("bf16_tflops" in meter.unavailable)


@needs_kernels
def test_buffer_takes_at_most_a_quarter_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 400 * MIB)
    buffer = ReadBuffer()
    assert buffer.num_bytes == 100 * MIB
    buffer.release()


@needs_kernels
def test_short_memory_is_a_reason_not_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 * MIB)
    with CeilingMeter(("read_gb_per_s",)) as meter:
        assert meter.measure_round() == {}
    assert "needs 64 MiB, 25 MiB can be taken" in meter.unavailable["read_gb_per_s"]
    assert meter.result().read_gb_per_s is None


def test_without_kernels_there_is_a_reason_not_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise NativeLibraryError("no compiler when it was installed")

    monkeypatch.setattr(native, "library", gone)
    with CeilingMeter() as meter:
        assert meter.measure_round() == {}
    assert set(meter.unavailable) == set(meter.kinds)
    assert meter.result().int8_tops is None
    assert meter.result().threads == 0


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="kind: expected read_gb_per_s"):
        measure_once("write_gb_per_s")  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(8192, dtype=torch.float32), "expected dtype uint8"),
        (torch.zeros(4, 8192, dtype=torch.uint8), "expected shape"),
        (torch.zeros(16, dtype=torch.uint8), "at least a page a thread"),
    ],
    ids=["dtype", "shape", "size"],
)
def test_kernel_refuses_a_bad_buffer(buffer: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.library().ceiling_read(buffer, 1.0)
