"""Builds a published shape straight in int4, with random codes: for models whose bf16 weights do not fit into memory.

No layer ever exists in bf16. Codes come from one random block tiled over every buffer, scales from the standard deviation
the published config initializes with. Only speed can be measured on such a model.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

from llmopt import native
from llmopt.arena import WeightArena, arena_for
from llmopt.models import resolve_model, shapes
from llmopt.models.base import ExpertsSite
from llmopt.ops.int4_linear import layout
from llmopt.ops.packed_tiles import packed_sums
from llmopt.packed import QuantEmbedding, QuantExperts, QuantLinear, kernel_group_size
from llmopt.passes.base import Applied, Coverage, Patch

# prime, so that no two rows of a weight are equal
_BLOCK_BYTES = 2**22 - 3
# torch alone takes minutes for the sums of a large model's tiles: those behind the first ones repeat them
_TILES_WITHOUT_KERNELS = 64
# standard deviation of a uniform code around its middle: 4 bits, and 8 bits
_CODE_STD = {4: 4.61, 8: 73.9}


class RandomCodes:
    """Makes packed buffers of random codes."""

    def __init__(self, std: float, seed: int, arena: WeightArena) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.std, self.arena = std, arena
        self.block = torch.randint(0, 256, (_BLOCK_BYTES,), dtype=torch.uint8, generator=generator)

    def packed(self, name: str, n: int, k: int, group: int, *, bits: int, experts: int | None = None) -> torch.Tensor:
        shape = layout.packed_shape(n, k, group, bits=bits, asymmetric=False)
        buffer = self.arena.take((experts, *shape) if experts else shape)
        flat, start, done = buffer.view(-1), zlib.crc32(name.encode()) % _BLOCK_BYTES, 0
        while done < flat.numel():
            count = min(_BLOCK_BYTES - start, flat.numel() - done)
            flat[done : done + count] = self.block[start : start + count]
            start, done = 0, done + count
        first = layout.planes(buffer, in_features=k, group_size=group, bits=bits, asymmetric=False)[0]
        lines, _ = layout.group_parts(first, in_features=k, group_size=group, asymmetric=False)
        scale = torch.full((layout.TILE_ROWS,), self.std / _CODE_STD[bits], dtype=torch.float16).view(torch.uint8)
        lines[..., : layout.TILE_ROWS * 2] = scale
        tiles = buffer.flatten(0, -2)
        # the planes of 8 bits lie apart, so that a part of such a weight is none
        some = tiles if bits == 8 or native.available() else tiles[:_TILES_WITHOUT_KERNELS]
        packed_sums(some, in_features=k, group_size=group, bits=bits)
        for rest in tiles.split(len(some))[1:]:
            rest.copy_(some[: len(rest)])
        return buffer


@torch.no_grad()
def build_quantized(shape: str, *, group_size: int = 128, head_bits: int = 8, seed: int = 0) -> tuple[Any, Applied]:
    """A model of a published shape with random int4 weights and an 8-bit (or 4-bit) head and embedding.

    Args:
        shape: name of a published shape.
        group_size: 32, 64, 128 or -1.
        head_bits: 8 or 4.
        seed: of the codes, norms and routers.

    Returns:
        The model in eval mode, and what was quantized (before: as bf16; after: as packed), as a pass would say it.
    """
    model: Any = shapes.meta_model(shape)
    resolved, coverage = resolve_model(model), Coverage()
    std = float(model.config.initializer_range)
    codes = RandomCodes(std, seed, arena_for(resolved))
    for layer in resolved.layers:
        for site in layer.linears():
            _linear(site.parent, site.attr, site.module, site.name, codes, coverage, group_size, 4)
        if layer.experts is not None:
            _experts(layer.experts, codes, coverage, group_size)
    embedding, head = resolved.embedding, resolved.head
    group = kernel_group_size(embedding.embedding_dim, 128)
    table_bits = head_bits if resolved.tied else 8
    module = _linear(head.parent, head.attr, head.module, head.name, codes, coverage, group, head_bits)
    packed = module.packed if resolved.tied else codes.packed(
        "embedding", embedding.num_embeddings, embedding.embedding_dim, group, bits=8
    )  # fmt: skip
    parent, attr = resolved.parent_of_embedding()
    table = QuantEmbedding(
        packed, num_embeddings=embedding.num_embeddings, embedding_dim=embedding.embedding_dim, bits=table_bits,
        group_size=group, dtype=embedding.weight.dtype, padding_idx=embedding.padding_idx,
    )  # fmt: skip
    setattr(parent, attr, table)
    sizes = [(m.in_features * m.out_features, m.packed.numel()) for m in model.modules() if _is_int4(m)]
    experts = [m for m in model.modules() if isinstance(m, QuantExperts)]
    sizes += [
        (3 * m.num_experts * m.hidden_dim * m.intermediate_dim, m.gate_up.numel() + m.down.numel()) for m in experts
    ]
    details = {"quantized_bytes_ratio": sum(after for _, after in sizes) / (2 * sum(numel for numel, _ in sizes))}
    coverage.share_of_weight_bytes = coverage.weight_bytes_before / shapes.parameter_bytes(shapes.config_for(shape))
    shapes.materialize_(model, seed=seed, std=std)
    model.llmopt_random_weights = True
    return model.eval(), Applied(Patch(), coverage, details, changes_numerics=True)


def _is_int4(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) and module.bits == 4


def _count(coverage: Coverage, kind: str, numel: int, buffers: list[torch.Tensor]) -> None:
    coverage.weight_bytes_before += 2 * numel
    coverage.weight_bytes_after += sum(b.numel() for b in buffers)
    coverage.touched += 1
    coverage.implementations[kind] = "cpu kernels"


def _linear(
    parent: nn.Module, attr: str, linear: nn.Linear, name: str, codes: RandomCodes, coverage: Coverage, group_size: int,
    bits: int,
) -> QuantLinear:  # fmt: skip
    n, k = linear.out_features, linear.in_features
    bias = None if linear.bias is None else torch.zeros(n, dtype=linear.bias.dtype)
    packed = codes.packed(name, n, k, kernel_group_size(k, group_size), bits=bits)
    module = QuantLinear(
        packed, bias, in_features=k, out_features=n, bits=bits, group_size=group_size, asymmetric=False
    )
    setattr(parent, attr, module)
    _count(coverage, f"int{bits} linear", n * k, [packed])
    return module


def _experts(site: ExpertsSite, codes: RandomCodes, coverage: Coverage, group_size: int) -> None:
    experts, hidden, inner = site.down.shape
    gate_up = codes.packed(
        f"{site.name}.gate_up", 2 * inner, hidden, kernel_group_size(hidden, group_size), bits=4, experts=experts
    )
    down = codes.packed(
        f"{site.name}.down", hidden, inner, kernel_group_size(inner, group_size), bits=4, experts=experts
    )
    numel = site.gate_up.numel() + site.down.numel()
    module = QuantExperts(
        gate_up, down, hidden_dim=hidden, intermediate_dim=inner, group_size=group_size, asymmetric=False
    )
    setattr(site.parent, site.attr, module)
    _count(coverage, "int4 experts", numel, [gate_up, down])
