"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in its absorbed form.

transformers' cache keeps the compressed latents, but its attention expands all of them through kv_b_proj at every step.
With ``W_UK`` and ``W_UV`` the two halves of kv_b_proj, ``q . (W_UK c) = (W_UK^T q) . c``: queries move into the latent space
once, attention runs over the cache as it is (one key/value "head" shared by all query heads), and ``W_UV`` is applied to
the result. Exact algebra, and a cost per step that no longer grows with heads times context.

The module's own forward stays: only its ``expand_kv`` is replaced, by one that hands the latents on unexpanded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmopt.ops.attention import attention
from llmopt.passes.swap_flash_attention.forward import CANDIDATES, mask_options
from llmopt.passes.swap_flash_attention.masks import Seen


class LatentAttention(nn.Module):
    """Attention of one MLA module from its latents; a child of that module, ``llmopt_latent``, while the pass is on.

    ``most_absorbed`` is the number of queries up to which the absorbed form is used: measured, see ``candidates``.
    """

    absorbed: torch.Tensor | None

    def __init__(self, module: Any) -> None:
        super().__init__()
        # in tuples: as plain attributes they would be registered as children
        self._module: tuple[Any] = (module,)
        self._absorbed_from: tuple[Any] | None = None
        self.rank: int = module.kv_lora_rank
        self.nope: int = module.qk_nope_head_dim
        self.rope: int = module.qk_rope_head_dim
        self.v_dim: int = module.v_head_dim
        self.num_heads: int = module.num_heads
        self.most_absorbed = 0
        self.register_buffer("absorbed", None, persistent=False)
        self.eval()

    @staticmethod
    def unsupported(module: Any) -> str:
        """Why this module cannot run on latents, or ''."""
        if not hasattr(type(module), "expand_kv"):
            return "this transformers keeps expanded keys and values in its cache, not latents"
        if getattr(module.kv_b_proj, "bias", None) is not None:
            return "kv_b_proj has a bias"
        if not isinstance(module.kv_b_proj, nn.Linear) and not hasattr(module.kv_b_proj, "dequantize"):
            return f"kv_b_proj is a {type(module.kv_b_proj).__name__}, whose weight cannot be read"
        return ""

    def keep_latent(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands for ``expand_kv``: latents ``[B, 1, Tk, R]`` and rope keys ``[B, 1, Tk, P]`` go on as they are."""
        return kv_nope, k_rot

    def expand(self, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, H, Tk, n + P]`` and values ``[B, H, Tk, V]``, by the class's own code."""
        module = self._module[0]
        expanded: tuple[torch.Tensor, torch.Tensor] = type(module).expand_kv(module, latent, k_rope)
        return expanded

    def expand_float(self, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``expand`` in float32, with the numbers that the weight stands for where it is quantized."""
        w_uk, w_uv = (half.float() for half in self._halves())
        k_nope = torch.einsum("btr,hnr->bhtn", latent[:, 0].float(), w_uk)
        value = torch.einsum("btr,hvr->bhtv", latent[:, 0].float(), w_uv)
        return torch.cat([k_nope, k_rope.float().expand(-1, self.num_heads, -1, -1)], dim=-1), value

    def run(
        self, query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, seen: Seen, scale: float, name: str
    ) -> torch.Tensor:
        """Attention output ``[B, Tq, H, V]``.

        Args:
            query: ``[B, H, Tq, n + P]``.
            latent: ``[B, 1, Tk, R]``, the cache as it is.
            k_rope: ``[B, 1, Tk, P]``.
            seen: the mask.
            scale: of the scores.
            name: candidate to run; the absorbed form is only for our kernel, which takes keys in two parts.
        """
        if name != "llmopt":
            return CANDIDATES[name](self._module[0], query, *self.expand(latent, k_rope), seen, scale)
        if query.shape[2] > self.most_absorbed:
            return self.run_expanded(query, latent, k_rope, seen, scale)
        return self.run_absorbed(query, latent, k_rope, seen, scale)

    def run_expanded(
        self, query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, seen: Seen, scale: float
    ) -> torch.Tensor:
        """Arguments as of ``run``. The rope keys stay one head, and nothing is concatenated."""
        q_nope, q_rope = query.split([self.nope, self.rope], dim=-1)
        expanded = self._module[0].kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_heads, self.nope + self.v_dim))
        k_nope, value = expanded.transpose(1, 2).split([self.nope, self.v_dim], dim=-1)
        return attention(q_nope, k_nope, value, scale=scale, q_rope=q_rope, k_rope=k_rope, **mask_options(seen))

    def run_absorbed(
        self, query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, seen: Seen, scale: float
    ) -> torch.Tensor:
        """Arguments as of ``run``."""
        batch, heads, num_queries, _ = query.shape
        w_uk, w_uv = self._halves()
        q_nope, q_rope = query.split([self.nope, self.rope], dim=-1)
        # heads first and batch with the queries: one product a head, and no copy of the weights for a batch
        rows = q_nope.permute(1, 0, 2, 3).reshape(heads, batch * num_queries, self.nope)
        q_latent = torch.bmm(rows, w_uk).view(heads, batch, num_queries, self.rank).transpose(0, 1)
        out = attention(q_latent, latent, latent, scale=scale, q_rope=q_rope, k_rope=k_rope, **mask_options(seen))
        # weights on the left: torch's bf16 product is several times slower with a single row there
        columns = torch.bmm(w_uv, out.view(batch * num_queries, heads, self.rank).permute(1, 2, 0))
        return columns.permute(2, 0, 1).reshape(batch, num_queries, heads, self.v_dim)

    def _halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``W_UK [H, n, R]`` and ``W_UV [H, V, R]``: views of kv_b_proj's weight or of its dequantized copy."""
        halves = self.weight().view(self.num_heads, self.nope + self.v_dim, self.rank)
        return halves[:, : self.nope], halves[:, self.nope :]

    def weight(self) -> torch.Tensor:
        """``[H * (n + V), R]``: the weight of the kv_b_proj that is in place now.

        Of a quantized one a dequantized copy is made once and kept; other passes may be switched on and off meanwhile.
        """
        module = self._module[0]
        kv_b = module.kv_b_proj
        if isinstance(kv_b, nn.Linear):
            return kv_b.weight
        if self.absorbed is None or self._absorbed_from is None or self._absorbed_from[0] is not kv_b:
            self.absorbed = kv_b.dequantize().to(module.kv_a_layernorm.weight.dtype)
            self._absorbed_from = (kv_b,)
        return self.absorbed

    def copied_bytes(self) -> int:
        """Bytes of the dequantized copy, 0 where the weight itself is used."""
        self.weight()
        return 0 if self.absorbed is None else self.absorbed.numel() * self.absorbed.element_size()
