"""The kernels, importable as ``llmopt.ops``. One folder an op: reference, spec, C++ per instruction set, public function.

Shape letters: B batch, T tokens, K in_features or head size, N out_features, H heads, I intermediate, E experts, G groups,
V vocab.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from llmopt.ops.spec import Case, OpSpec

__all__ = ["SPECS", "Case", "OpSpec"]

_OPS = (
    "int4_linear", "int8_linear", "int4_experts", "attention",
    "embed", "fused_linear", "rope_cache", "cache_attention", "latent_cache", "latent_attention", "latent_output",
    "moe", "next_token", "sample_token", "screened_head",
)  # fmt: skip


class _Specs(Mapping[str, OpSpec]):
    """Specs by op name, each imported when asked for."""

    def __getitem__(self, name: str) -> OpSpec:
        if name not in _OPS:
            raise KeyError(name)
        spec: OpSpec = importlib.import_module(f"llmopt.ops.{name}.spec").SPEC
        return spec

    def __iter__(self) -> Iterator[str]:
        return iter(_OPS)

    def __len__(self) -> int:
        return len(_OPS)


SPECS: Mapping[str, OpSpec] = _Specs()
