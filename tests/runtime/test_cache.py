"""The KV cache: room, growth, and what transformers asks of a cache."""

from __future__ import annotations

import pytest
import torch

from llmopt.errors import InputError
from llmopt.runtime.cache import KVCache


def filled(sequences: int = 3, length: int = 5, capacity: int = 8, rank: int | None = None) -> KVCache:
    dims = (6, 0) if rank else (4, 4)
    cache = KVCache(sequences, 2, 1 if rank else 2, dims, capacity, torch.float32, rank)
    for layer in range(2):
        for tensor in (cache.keys[layer], cache.values[layer]):
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(layer)))
    cache.length = length
    return cache


def test_growing_keeps_what_is_there() -> None:
    cache = filled()
    before = [t[:, :, :5].clone() for t in (*cache.keys, *cache.values)]
    cache.reserve(8)
    assert cache.capacity == 8
    cache.reserve(9)
    assert cache.capacity >= 9
    for a, b in zip(before, (*cache.keys, *cache.values), strict=True):
        assert torch.equal(a, b[:, :, :5])
        assert b.is_contiguous()


def test_update_writes_behind_what_is_seen() -> None:
    cache = filled(length=7)
    new = torch.ones(3, 2, 4, 4)
    for layer in range(2):
        keys, values = cache.update(new, 2 * new, layer)
        assert keys.shape == values.shape == (3, 2, 11, 4)
        assert bool((keys[:, :, 7:] == 1).all())
        assert bool((values[:, :, 7:] == 2).all())
    assert cache.get_seq_length() == 11


def test_latents_and_rope_keys_lie_side_by_side() -> None:
    cache = filled(rank=4)
    latents, rope = cache.update(torch.full((3, 1, 1, 4), 7.0), torch.full((3, 1, 1, 2), 9.0), 0)
    assert latents.shape == (3, 1, 6, 4)
    assert rope.shape == (3, 1, 6, 2)
    assert cache.keys[0][0, 0, 5].tolist() == [7.0] * 4 + [9.0] * 2


def test_beams_are_reordered_selected_and_repeated() -> None:
    cache = filled()
    cache.start.copy_(torch.tensor([0, 1, 2]))
    keys = cache.keys[1].clone()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.keys[1][:, :, :5], keys[[2, 0, 0], :, :5])
    assert cache.start.tolist() == [2, 0, 0]
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.keys[1][:, :, :5], keys[[0], :, :5])
    cache.batch_repeat_interleave(2)
    assert cache.sequences == 2
    assert torch.equal(cache.values[0][0, :, :5], cache.values[0][1, :, :5])
    with pytest.raises(InputError, match="one dimension"):
        cache.batch_select_indices(torch.zeros(1, 1, dtype=torch.int64))


def test_cropping_and_resetting() -> None:
    cache = filled()
    cache.crop(3)
    assert cache.get_seq_length() == 3
    cache.crop(-1)
    assert cache.get_seq_length() == 2
    cache.crop(0)  # assisted decoding takes no token back
    assert cache.get_seq_length() == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.capacity == 8
