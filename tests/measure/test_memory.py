"""Memory figures: what the kernel counts, shared storages once, cgroup limits, and a process of its own."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from llmopt.errors import InputError
from llmopt.measure import memory
from llmopt.models.shapes import tiny_model

MIB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@needs_proc
def test_peak_rss_sees_memory_that_is_gone_again_and_reset_forgets_it() -> None:
    assert memory.peak_rss_reset()
    before = memory.peak_rss().value
    # pages of their own, not malloc's: a process that has freed much may hand out memory it never gave back
    with mmap.mmap(-1, 128 * MIB) as pages:
        pages[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)
    peak, now = memory.peak_rss().value, memory.current_rss().value
    assert before is not None
    assert peak is not None
    assert now is not None
    assert peak - before > 100 * MIB
    assert peak - now > 100 * MIB
    assert memory.peak_rss_reset()
    again = memory.peak_rss().value
    assert again is not None
    assert again < peak - 100 * MIB


def test_without_proc_there_is_a_reason_and_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    assert memory.peak_rss_reset() is False
    for reading in (memory.peak_rss(), memory.current_rss()):
        assert reading.value is None
        assert str(tmp_path / "status") in reading.how


def test_module_bytes_counts_shared_storages_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.embed.weight
            storage = torch.zeros(64, dtype=torch.uint8)
            self.register_buffer("low", storage[:32])
            self.register_buffer("high", storage[32:])

    assert memory.module_bytes(Tied()) == 100 * 8 * 4 + 64


def test_module_bytes_of_a_model_is_its_weights_plus_rotary_tables() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    parameters = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    buffers = {b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    assert memory.module_bytes(model) == sum((parameters | buffers).values())


MEMINFO = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"
V2 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "0::/pod/box\n",
    "sys/fs/cgroup/pod/box/memory.max": "max\n",
    "sys/fs/cgroup/pod/box/memory.current": "1\n",
    "sys/fs/cgroup/pod/box/memory.stat": "anon 1\n",
    "sys/fs/cgroup/pod/memory.max": str(1000 * MIB),
    "sys/fs/cgroup/pod/memory.current": str(600 * MIB),
    "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {100 * MIB}\n",
}
V1 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "9:name=systemd:/\n4:memory:/not/in/this/mount\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2000 * MIB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(500 * MIB),
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {50 * MIB}\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": MEMINFO}, 8388608 * 1024),
        (V2, 500 * MIB),
        (V1, 1550 * MIB),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 8388608 * 1024),
        ({**V2, "sys/fs/cgroup/pod/memory.current": str(1200 * MIB)}, 0),
        ({}, None),
    ],
    ids=["no_cgroup", "v2_limit_of_a_parent", "v1_in_a_container", "v1_unlimited", "over_the_limit", "no_proc"],
)
def test_available_bytes(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    assert memory.available_bytes(write(tmp_path, files)) == expected


def test_available_bytes_of_this_machine_is_below_its_total() -> None:
    total, available = memory.meminfo("MemTotal"), memory.available_bytes()
    assert total is not None
    assert available is not None
    assert 0 < available <= total


def test_isolated_process_loads_generates_and_counts(tmp_path: Path) -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    measured = memory.measure_isolated(
        tmp_path / "model", prompt_tokens=8, new_tokens=3, implementation="eager", threads=1
    )
    assert measured.weight_bytes == memory.module_bytes(model)
    assert (measured.prompt_tokens, measured.new_tokens) == (8, 3)
    assert measured.peak_rss is not None
    assert measured.imports_rss is not None
    assert measured.peak_rss >= measured.imports_rss > 20 * MIB
    assert "nothing but load and generate" in measured.how


def test_isolated_process_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(memory.MemoryMeasurementError, match="gpt2"):
        memory.measure_isolated(tmp_path, threads=1)


def test_isolated_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="existing directory"):
        memory.measure_isolated(tmp_path / "gone")
