"""The KV cache: room, growth, and what transformers asks of a cache."""

from __future__ import annotations

import pytest
import torch

from llmopt.errors import InputError
from llmopt.runtime.cache import KVCache

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=["f32", "int8"])


def filled(
    sequences: int = 3, length: int = 5, capacity: int = 8, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> KVCache:
    dims = (6, 0) if rank else (4, 4)
    cache = KVCache(sequences, 2, 1 if rank else 2, dims, capacity, dtype, rank)
    g = torch.Generator().manual_seed(0)
    for tensor in cache.tensors():
        tensor.copy_(torch.rand(tensor.shape, generator=g) * (200 if tensor.dtype == torch.int8 else 1) - 0.5)
    cache.length = length
    return cache


@DTYPES
def test_growing_keeps_what_is_there(dtype: torch.dtype) -> None:
    cache = filled(dtype=dtype)
    before = [t[:, :, :5].clone() for t in cache.tensors()]
    cache.reserve(8)
    assert cache.capacity == 8
    cache.reserve(9)
    assert cache.capacity >= 9
    for a, b in zip(before, cache.tensors(), strict=True):
        assert torch.equal(a, b[:, :, :5])
        assert b.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_update_of_an_int8_cache_gives_what_is_kept_in_the_states_dtype(dtype: torch.dtype) -> None:
    cache = filled(length=7, dtype=torch.int8)
    g = torch.Generator().manual_seed(1)
    new = [(torch.randn(3, 2, 4, 4, generator=g) * 10.0**i).to(dtype) for i in (-3, 4)]
    new[1][:, :, 2] = 0.0
    before = [(cache.keys[1] * cache.key_scales[1][..., None])[:, :, :7], cache.values[0][:, :, :7].clone()]
    keys, values = cache.update(*new, 1)
    assert keys.dtype == values.dtype == dtype
    assert keys.shape == values.shape == (3, 2, 11, 4)
    assert torch.equal(keys[:, :, :7], before[0].to(dtype))
    assert torch.equal(cache.values[0][:, :, :7], before[1])
    for got, want in zip((keys, values), new, strict=True):
        step = want.float().abs().amax(-1, keepdim=True) / 127
        assert ((got[:, :, 7:] - want).abs().float() <= 0.501 * step + 2**-8 * want.abs().float()).all()
    # what is kept does not change when it is read again
    again, _ = cache.update(new[0][:, :, :1], new[1][:, :, :1], 1)
    assert torch.equal(again[:, :, :11], keys)


def test_a_cache_that_is_not_int8_has_no_scales() -> None:
    cache = filled()
    assert cache.scales(1) == (None, None)
    assert cache.query_dtype == torch.float32
    assert len(cache.tensors()) == 4
    assert filled(dtype=torch.int8).query_dtype == torch.bfloat16


def test_int8_latents_have_their_rope_keys_in_bf16_behind_them() -> None:
    cache = filled(rank=4, dtype=torch.int8)
    assert [tuple(t.shape) for t in cache.tensors()[::2]] == [(3, 1, 8, 8), (3, 1, 8, 0), (3, 1, 8)]
    assert cache.scales(0)[1] is None
    latents = torch.tensor([1.0, -2.0, 0.0, 127.0]).expand(3, 1, 1, 4)
    rope = torch.tensor([0.1, -3e4]).expand(3, 1, 1, 2)
    got = cache.update(latents, rope, 1)
    assert torch.equal(got[0][:, :, 5:], latents)
    assert torch.equal(got[1][:, :, 5:], rope.bfloat16().float())
    assert cache.keys[1][0, 0, 5, :4].tolist() == [1, -2, 0, 127]
    assert cache.key_scales[1][:, :, 5].tolist() == [[1.0]] * 3


def test_int8_latents_are_of_even_rank() -> None:
    with pytest.raises(InputError, match="latent_rank: expected an even number for int8, got 3"):
        filled(rank=3, dtype=torch.int8)


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


@DTYPES
def test_beams_are_reordered_selected_and_repeated(dtype: torch.dtype) -> None:
    cache = filled(dtype=dtype)
    cache.start.copy_(torch.tensor([0, 1, 2]))
    before = [t.clone() for t in cache.tensors()]

    def holds(*sequences: int) -> bool:
        return all(
            torch.equal(now[:, :, :5], old[list(sequences), :, :5])
            for now, old in zip(cache.tensors(), before, strict=True)
        )

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert holds(2, 0, 0)
    assert cache.start.tolist() == [2, 0, 0]
    cache.batch_select_indices(torch.tensor([1]))
    assert holds(0)
    cache.batch_repeat_interleave(2)
    assert cache.sequences == 2
    assert holds(0, 0)
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


def test_a_choice_of_as_many_sequences_keeps_the_place_that_steps_know_and_another_drops_the_step() -> None:
    cache = KVCache(4, 2, 1, (8, 8), 16, torch.float32)
    cache.start.copy_(torch.arange(4, dtype=torch.int32))
    start, address, step = cache.start, cache.start.data_ptr(), object()
    cache.step = step
    cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    assert cache.start is start
    assert cache.start.data_ptr() == address
    assert cache.start.tolist() == [3, 3, 0, 1]
    assert cache.step is step
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert cache.start.tolist() == [3, 0]
    assert cache.step is None
