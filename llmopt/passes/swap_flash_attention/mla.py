"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in its absorbed form.

transformers' cache keeps the compressed latents, but its attention expands all of them through kv_b_proj at every step.
With ``W_UK`` and ``W_UV`` the two halves of kv_b_proj, ``q . (W_UK c) = (W_UK^T q) . c``: queries move into the latent space
once, attention runs over the cache as it is (one key/value "head" shared by all query heads), and ``W_UV`` is applied to
the result. Exact algebra, and a cost per step that no longer grows with heads times context.

The module's own forward stays: only its ``expand_kv`` is replaced, by one that hands the latents on unexpanded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmopt.ops.attention import attention


class LatentAttention:
    """Runs the attention of one MLA module on latents; lives on the module as ``llmopt_mla`` while the pass is on."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.rank: int = module.kv_lora_rank
        self.nope: int = module.qk_nope_head_dim
        self.rope: int = module.qk_rope_head_dim
        self.v_dim: int = module.v_head_dim
        self.heads: int = module.num_heads

    def keep_latent(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands for ``expand_kv``: latents ``[B, 1, Tk, R]`` and rope keys ``[B, 1, Tk, P]`` go on as they are."""
        return kv_nope, k_rot

    def holds_latent(self, key: torch.Tensor) -> bool:
        return key.shape[1] == 1 and key.shape[3] == self.rank

    def expand(self, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, H, Tk, n + P]`` and values ``[B, H, Tk, V]``, by the class's own code."""
        expanded: tuple[torch.Tensor, torch.Tensor] = type(self.module).expand_kv(self.module, latent, k_rope)
        return expanded

    def absorb_is_cheaper(self, q_length: int, kv_length: int) -> bool:
        """Compare multiply-adds per head of both forms; expanding pays once many queries share it."""
        absorbed = q_length * (kv_length * (2 * self.rank + self.rope) + self.rank * (self.nope + self.v_dim))
        expanded = kv_length * self.rank * (self.nope + self.v_dim)
        expanded += q_length * kv_length * (self.nope + self.rope + self.v_dim)
        return absorbed < expanded

    def run(
        self, query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, mask: torch.Tensor | None, scale: float,
        prefill: Callable[..., torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Attention output ``[B, Tq, H, V]`` from query ``[B, H, Tq, n + P]`` and the latent cache."""
        if not self.absorb_is_cheaper(query.shape[2], latent.shape[2]):
            key, value = self.expand(latent, k_rope)
            return prefill(self.module, query, key, value, mask, scale)
        w_uk, w_uv = self._halves()
        q_nope, q_rope = query.split([self.nope, self.rope], dim=-1)
        q_latent = torch.matmul(q_nope, w_uk)
        options: dict[str, Any] = {"key_mask": mask}
        if mask is not None and mask.dim() == 4:
            options = {"mask": mask, "causal": False}
        out = attention(q_latent, latent, latent, scale=scale, q_rope=q_rope, k_rope=k_rope, **options)
        # [B, Tq, H, R] -> [B, H, Tq, R] @ [H, R, V] -> [B, Tq, H, V]
        return torch.matmul(out.transpose(1, 2), w_uv.transpose(1, 2)).transpose(1, 2)

    def _halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``W_UK [H, n, R]`` and ``W_UV [H, V, R]``, views of kv_b_proj's weight or of its dequantized copy."""
        weight = absorbed_weight(self.module.kv_b_proj, self.module.kv_a_layernorm.weight.dtype)
        halves = weight.view(self.heads, self.nope + self.v_dim, self.rank)
        return halves[:, : self.nope], halves[:, self.nope :]


def absorbed_weight(kv_b: Any, dtype: torch.dtype) -> torch.Tensor:
    """``[H * (n + V), R]``: a linear's own weight; of a quantized linear a copy, made once and kept as its buffer."""
    if isinstance(kv_b, nn.Linear):
        return kv_b.weight
    if getattr(kv_b, "absorbed_weight", None) is None:
        kv_b.register_buffer("absorbed_weight", kv_b.dequantize().to(dtype), persistent=False)
    copy: torch.Tensor = kv_b.absorbed_weight
    return copy
