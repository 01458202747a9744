"""moe: the whole mixture-of-experts block of a decoder layer as one op, from the norm to the residual.

``h += MoE(RMSNorm(h))``: norm, router, choice of the experts, routed and shared experts, weighted sum. In a recorded
program (kernels/cpu/program.h) it is one task; a decode step then reads the chosen experts, the shared ones and the router
once, as one stream a thread.

How the published families choose (transformers 5, ``modeling_*.py``), as values of :class:`Routing`:

============ ========= ==================== =============================== ======================== ======
family       scoring   correction bias      groups                          weights divided by       scale
============ ========= ==================== =============================== ======================== ======
qwen3_moe    softmax   no                   no                              their sum                no
ernie4_5_moe softmax   yes                  no                              their sum, at least      no
                                                                            ``moe_norm_min``
deepseek_v2  softmax   no                   the best one of each            nothing                  yes
                                            (``group_limited_greedy``)
deepseek_v3  sigmoid   yes                  the sum of the best two of each their sum + 1e-20        yes
============ ========= ==================== =============================== ======================== ======
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from llmopt import native
from llmopt.errors import InputError
from llmopt.ops.device import implementation, registered

__all__ = ["MOST_DENSE_TOKENS", "Routing", "SharedExperts", "moe", "route"]

Scoring = Literal["softmax", "sigmoid"]

# of one call of the kernel, of weights that are not packed; more take several
MOST_DENSE_TOKENS = 64

_LIBRARY = torch.library.Library("llmopt", "FRAGMENT")
_LIBRARY.define(
    "moe(Tensor(a!) h, Tensor norm, Tensor router, Tensor? correction_bias, Tensor gate_up, Tensor down, "
    "Tensor? shared_gate, Tensor? shared_up, Tensor? shared_down, float eps, int[] sizes, int[] shared_sizes, "
    "int[] choice, float[] weighting) -> ()"
)


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token's experts are chosen and weighted.

    Scores are the softmax or the sigmoid of the logits. The best ``top_k`` are chosen, by score plus correction bias where
    there is one, among the experts of the best ``topk_group`` of ``n_group`` groups; a group counts as the sum of its best
    ``group_best`` (1 or 2). Weights are the scores of the chosen, without the bias; ``renormalize`` divides them by
    ``max(sum + sum_eps, sum_min)``; ``scale`` multiplies them.
    """

    top_k: int
    scoring: Scoring = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 1
    renormalize: bool = False
    sum_eps: float = 0.0
    sum_min: float = 0.0
    scale: float = 1.0

    def choice(self) -> list[int]:
        """The whole numbers, as the kernel takes them.

        Raises:
            InputError: no such scoring.
        """
        if self.scoring not in get_args(Scoring):
            raise InputError.argument("scoring", expected=" or ".join(get_args(Scoring)), got=self.scoring)
        return [self.top_k, int(self.scoring == "sigmoid"), self.n_group, self.topk_group, self.group_best]

    def weighting(self) -> list[float]:
        """The other numbers, as the kernel takes them."""
        return [float(self.renormalize), self.sum_eps, self.sum_min, self.scale]


@dataclass(frozen=True, slots=True)
class SharedExperts:
    """The experts that every token goes through, as one MLP.

    Packed ``gate`` and ``up`` ``[tiles, bytes]`` of ``[S, H]`` and ``down`` of ``[H, S]``, 4 or 8 bits; or all three of a
    floating dtype, ``[S, H]``, ``[S, H]``, ``[H, S]``, contiguous. ``intermediate`` is S.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    intermediate: int
    group_size: int = 128
    down_group_size: int = 128
    bits: int = 4
    asymmetric: bool = False

    def sizes(self) -> list[int]:
        """The numbers, as the kernel takes them."""
        return [self.intermediate, self.group_size, self.down_group_size, self.bits, int(self.asymmetric)]


def moe(
    h: torch.Tensor,
    norm: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    eps: float,
    routing: Routing,
    intermediate: int,
    group_size: int = 128,
    down_group_size: int = 128,
    asymmetric: bool = False,
    correction_bias: torch.Tensor | None = None,
    shared: SharedExperts | None = None,
) -> None:
    """``h[t] += shared(x) + sum_j w[j] * down[e_j](silu(gate[e_j](x)) * up[e_j](x))`` with ``x = RMSNorm(h[t])``, in place.

    While a program is recorded on this thread the block is kept instead of run; the tensors must then outlive it.

    Args:
        h: ``[T, H]`` float32, the residual stream; rows may lie apart.
        norm: ``[H]`` float32, weight of the RMSNorm.
        router: ``[E, H]`` float32, bfloat16 or float16, contiguous; multiplied in float32.
        gate_up: ``[E, tiles, bytes]`` uint8, packed int4 ``[2I, H]`` an expert, gate rows first; or ``[E, 2I, H]`` of a
            floating dtype. Contiguous.
        down: ``[E, tiles, bytes]`` uint8, packed int4 ``[H, I]`` an expert; or ``[E, H, I]`` of a floating dtype.
        eps: of the norm.
        routing: how experts are chosen.
        intermediate: I.
        group_size, down_group_size: of packed gate_up and down, 32, 64 or 128.
        asymmetric: packed gate_up and down carry zero points.
        correction_bias: ``[E]`` float32, added to the scores for the choice alone.
        shared: the shared experts, if there are any.

    Raises:
        InputError: shapes, dtypes or options do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    parts = (shared.gate, shared.up, shared.down) if shared is not None else (None, None, None)
    sizes = [intermediate, group_size, down_group_size, 4, int(asymmetric)]
    shared_sizes = shared.sizes() if shared is not None else []
    args = (h, norm, router, correction_bias, gate_up, down, *parts, eps, sizes, shared_sizes, routing.choice(),
            routing.weighting())  # fmt: skip
    if torch.compiler.is_compiling():
        torch.ops.llmopt.moe(*args)
    else:
        implementation("moe", _cpu, h)(*args)


def route(
    logits: torch.Tensor, routing: Routing, correction_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice alone: ``logits [T, E]`` float32 to experts ``[T, k]`` int64, best first, and their weights, float32.

    Raises:
        InputError: shapes, dtypes or options do not fit together.
        NativeLibraryError: the compiled kernels are not installed.
    """
    shape = (logits.shape[0] if logits.dim() else 0, max(routing.top_k, 0))
    index, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32)
    try:
        native.library().moe_route(
            logits, correction_bias, routing.choice(), routing.weighting(), index, weights
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"route: {error}") from None
    return index, weights


def _cpu(
    h: torch.Tensor, norm: torch.Tensor, router: torch.Tensor, correction_bias: torch.Tensor | None,
    gate_up: torch.Tensor, down: torch.Tensor, shared_gate: torch.Tensor | None, shared_up: torch.Tensor | None,
    shared_down: torch.Tensor | None, eps: float, sizes: list[int], shared_sizes: list[int], choice: list[int],
    weighting: list[float],
) -> None:  # fmt: skip
    shared = [t for t in (shared_gate, shared_up, shared_down) if t is not None]
    packed = gate_up.dtype == torch.uint8
    try:
        for part in (h,) if packed or h.dim() != 2 else h.split(MOST_DENSE_TOKENS):
            native.library().moe(
                part, norm, eps, router, correction_bias, choice, weighting, gate_up, down, sizes, shared, shared_sizes
            )
    except ValueError as error:
        raise InputError(f"moe: {error}") from None


def _fake(
    h: torch.Tensor, norm: torch.Tensor, router: torch.Tensor, correction_bias: torch.Tensor | None,
    gate_up: torch.Tensor, down: torch.Tensor, shared_gate: torch.Tensor | None, shared_up: torch.Tensor | None,
    shared_down: torch.Tensor | None, eps: float, sizes: list[int], shared_sizes: list[int], choice: list[int],
    weighting: list[float],
) -> None:  # fmt: skip
    return None


_LIBRARY.impl("moe", _cpu, "CPU")
_LIBRARY.impl("moe", registered("moe"), "CUDA")
torch.library.register_fake("llmopt::moe", _fake, lib=_LIBRARY)
