"""The block that packed weights lie in."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from llmopt import arena, native
from llmopt.arena import WeightArena
from llmopt.measure.memory import module_bytes

MB = 1 << 20


class Packed(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 255, (size,), dtype=torch.uint8))
        self.register_buffer("bias", torch.randn(4))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "SMALL_BYTES", 0)


def test_tensors_lie_one_after_the_other_on_cache_lines(small: None) -> None:
    block = WeightArena(MB)
    a, b, c = block.take((100,)), block.take((3, 70)), block.take((64,))
    assert a.data_ptr() % (2 * MB) == 0
    assert [b.data_ptr() - a.data_ptr(), c.data_ptr() - b.data_ptr()] == [128, 256]
    assert b.shape == (3, 70)


def test_what_does_not_fit_gets_memory_of_its_own(small: None) -> None:
    block = WeightArena(1000)
    inside, outside = block.take((900,)), block.take((200,))
    assert outside.untyped_storage().data_ptr() != inside.untyped_storage().data_ptr()
    outside.fill_(1)


def test_a_small_model_is_left_alone() -> None:
    module = Packed(1000)
    before = module.packed
    WeightArena(10 * MB).adopt(module)
    assert module.packed is before


def test_adopting_keeps_bytes_and_touches_nothing_else(small: None) -> None:
    module, block = nn.Sequential(Packed(1000), Packed(50)), WeightArena(MB)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    bias = module[0].bias
    block.adopt(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.named_buffers())
    assert module[0].bias is bias
    assert module[0].packed.untyped_storage().data_ptr() == module[1].packed.untyped_storage().data_ptr()
    placed = module[0].packed
    block.adopt(module)
    assert module[0].packed is placed, "a second time changes nothing"


def test_memory_is_counted_by_what_is_used(small: None) -> None:
    module = nn.Sequential(Packed(1000), Packed(50))
    before = module_bytes(module)
    WeightArena(MB).adopt(module)
    assert module_bytes(module) == before


def test_a_copy_does_not_share_memory(small: None) -> None:
    module = Packed(1000)
    WeightArena(MB).adopt(module)
    twin = copy.deepcopy(module)
    twin.packed.zero_()
    assert module.packed.any()


def test_other_devices_and_dtypes_stay_where_they_are(small: None) -> None:
    block = WeightArena(MB)
    for tensor in (torch.empty(10, dtype=torch.uint8, device="meta"), torch.ones(10)):
        assert block.place(tensor) is tensor


@pytest.mark.skipif(not native.available(), reason="no compiled kernels")
def test_memory_comes_ahead_of_use_and_what_is_written_stays(small: None) -> None:
    block = WeightArena(64 * MB)
    with block.populated(40 * MB):
        written = [block.take((MB,)).fill_(i) for i in range(40)]
    assert all((tensor == i).all() for i, tensor in enumerate(written))
    with block.populated(64 * MB):
        pass
    assert all((tensor == i).all() for i, tensor in enumerate(written))
    assert not [t for t in threading.enumerate() if t.name == "llmopt-arena"]


@pytest.mark.skipif(not native.available(), reason="no compiled kernels")
def test_the_thread_ends_with_an_error_inside(small: None) -> None:
    with pytest.raises(RuntimeError, match="inside"), WeightArena(64 * MB).populated(64 * MB):
        raise RuntimeError("inside")
    assert not [t for t in threading.enumerate() if t.name == "llmopt-arena"]
