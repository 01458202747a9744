"""Synthetic receipts: every kind of row a real one can have, without running a model."""

from __future__ import annotations

from typing import Any

import pytest

from llmopt.measure.comparison import Comparison, ComparisonRow
from llmopt.measure.report import (
    Ceilings,
    Gain,
    Interval,
    Memory,
    PassRow,
    Quality,
    Report,
    Timing,
)

ENVIRONMENT = {
    "date": "2026-01-31T12:00:00Z",
    "cpu": {"model": "Intel(R) Xeon(R) Processor", "arch": "x86_64", "isa": ["avx2", "avx512f"], "cores": 2},
    "threads": 2,
    "memory": {"total": 25_276_063_744, "available": 20_000_000_000},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "llmopt": "0.1.0"},
    "kernels": {"isa": "avx512", "path": "lib.so", "reason": None},
    "gpu": None,
    "git": {"commit": "1a2b3c4d5e6f", "dirty": True},
}


def interval(value: float, half_width: float = 0.02) -> Interval:
    return Interval(value, value * (1 - half_width), value * (1 + half_width), 12)


def timing(prefill_ms: float, decode_ms: float) -> Timing:
    return Timing(interval(prefill_ms), interval(decode_ms), 128, 64)


def gain(prefill: float, decode: float) -> Gain:
    return Gain(interval(prefill), interval(decode))


def quality(mean_kl: float) -> Quality:
    return Quality(4096, mean_kl, 40 * mean_kl, 0.978, 14.4, 1.0112, 0.92, "model.layers.0")


def _kept() -> PassRow:
    coverage = {
        "touched": 197,
        "share_of_weight_bytes": 0.998,
        "weight_bytes_before": 1_192_099_840,
        "weight_bytes_after": 335_000_000,
        "implementations": {"linears": "int4_linear avx512"},
        "skipped": {f"model.layers.{i}.mlp.gate": "router stays in bfloat16" for i in range(5)},
    }
    return PassRow(
        "quantize_gptq", "kept", "4.02x faster decode", {"bits": 4}, 184.2, timing(240, 15.4), gain(3.38, 4.02),
        gain(3.38, 4.02), gain(3.2, 3.6), quality(0.0123), Memory(335_000_000, 820_000_000), 3940.0, 0.83, coverage,
    )  # fmt: skip


def _undone() -> PassRow:
    return PassRow(
        "fuse_kernels", "undone", "slower beyond the noise", {}, 0.4, timing(173, 14.06), gain(0.999, 0.953),
        gain(4.6, 4.41), None, quality(0.0124), Memory(335_000_000), None, 0.81, {"touched": 56},
    )  # fmt: skip


@pytest.fixture
def full_report() -> Report:
    """One pass kept, one undone, one not applicable, all figures present."""
    return Report(
        model={
            "name": "Qwen3-0.6B",
            "model_type": "qwen3",
            "parameters": 596_049_920,
            "weight_bytes": 1_192_099_840,
            "dtype": "bfloat16",
            "random_weights": False,
        },
        environment=ENVIRONMENT,
        settings={"rounds": 12, "seed": 0},
        baseline=timing(812, 62.1),
        stock=timing(760, 61.4),
        stock_implementations={"attention": "sdpa", "experts": "grouped_mm"},
        stock_gain=gain(1.068, 1.012),
        baseline_quality=quality(0.0),
        baseline_memory=Memory(1_192_099_840, 1_900_000_000),
        passes=[_kept(), _undone(), PassRow("compile_tvm", "not applicable", "apache-tvm is not installed")],
        ceilings=Ceilings(interval(17.4), interval(0.62), None, 2),
        notes=["baseline scaled from 6 of 48 layers"],
        measured_s=71.2,
    )


@pytest.fixture
def unmeasured_report(full_report: Report) -> Report:
    """``measure=False`` on random weights: verdicts and bytes, no times, no quality."""
    report = Report(
        model={**full_report.model, "random_weights": True},
        environment=ENVIRONMENT,
        settings={},
        baseline_memory=full_report.baseline_memory,
        passes=full_report.passes,
    )
    for row in report.passes:
        row.timing = row.marginal = row.total = row.leave_one_out = row.quality = None
        row.break_even_tokens = row.bandwidth_fraction = None
    return report


@pytest.fixture
def empty_report() -> Report:
    """Nothing known at all."""
    return Report({}, {}, {})


def _compared(name: str, weights: str, timed: Timing, num_bytes: int, **fields: Any) -> ComparisonRow:
    model = {
        "name": f"/models/{name}", "model_type": "qwen3", "layers": 28, "hidden_size": 1024, "vocab_size": 151_936,
        "dtype": "bfloat16", "weights": weights, "attention": "sdpa", "experts": None, "passes": [],
        "random_weights": False,
    }  # fmt: skip
    return ComparisonRow(name, model, timed, Memory(num_bytes), **fields)


@pytest.fixture
def comparison() -> Comparison:
    """Three models: the reference, one with all figures, one whose quality could not be measured."""
    first = _compared("bf16", "bfloat16", timing(812, 62.1), 1_192_099_840, bandwidth_fraction=0.91)
    first.quality = Quality(4096, 0.0, 0.0, 1.0, 14.4, 1.0, 0.0, None)
    int4 = _compared(
        "int4", "int4 g128, int8 g128, bfloat16", timing(240, 15.4), 335_000_000, gain=gain(3.38, 4.02),
        request=interval(3.97), quality=quality(0.0123), bandwidth_fraction=0.83,
    )  # fmt: skip
    int4.model["passes"] = ["quantize_gptq"]
    other = _compared("other", "float32", timing(810, 62.0), 2_000_000_000, gain=gain(1.002, 1.001))
    other.request, other.notes = interval(1.001), ["quality was not measured: its tokenizer reads text differently"]
    return Comparison(
        rows=[first, int4, other],
        environment=ENVIRONMENT,
        settings={"prompt": "held-out text", "request_tokens": 128, "seed": 0},
        ceilings=Ceilings(interval(17.4), interval(0.62), None, 2),
        notes=["the machine was busy"],
        measured_s=41.0,
    )
