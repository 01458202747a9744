"""Whether the greedy token comes from a screened head (:mod:`llmopt.ops.screened_head`), and how often it is the right one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmopt.ops.fused_linear import Weight
from llmopt.ops.int4_linear import layout
from llmopt.ops.screened_head import screened_head
from llmopt.runtime.rows import Rows

if TYPE_CHECKING:
    from llmopt.runtime.engine import Engine

# sequences up to which reading half of the head saves more than the screen's own work costs
MOST_SEQUENCES = 16
# bytes of a head below which there is little to save
_LEAST_BYTES = 8 << 20
# positions whose logits are held at once while agreement is measured
_POSITIONS = 32


def unfit(head: Weight) -> str:
    """Why a head cannot be screened, or ''."""
    if head.bits != 8:
        return f"a screen needs 8 bits, the head has {head.bits}"
    return "a screen needs symmetric codes and no bias" if head.asymmetric or head.bias is not None else ""


def pays(head: Weight) -> bool:
    """True for a head that is large enough."""
    return head.data.numel() >= _LEAST_BYTES


def bytes_spared(head: Weight) -> int:
    """Bytes of the head that a screened step does not read; the few rows scored with 8 bits aside."""
    return head.data.shape[0] * layout.plane_bytes(head.cols, head.group_size)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The screened head beside the same head without a screen.

    Attributes:
        positions: compared.
        share: of them with the same top-1.
        rows_scored: mean share of the rows that were scored with 8 bits.
    """

    positions: int
    share: float
    rows_scored: float


@torch.no_grad()
def agreement(engine: Engine, ids: torch.Tensor) -> Agreement:
    """Compare both heads after every token of ``ids`` [T] int64."""
    tokens = len(ids)
    h = torch.empty(tokens, engine.hidden_size)
    engine.embed(ids.contiguous(), h)
    rows = Rows.of_batch(1, tokens, 0, None, None, ids.device)
    engine.hidden(h, rows, engine.new_cache(1, tokens), tokens)
    same, tiles = 0, 0
    for part in h.split(_POSITIONS):
        chosen, scored = torch.empty(len(part), dtype=torch.int64), torch.empty(len(part), dtype=torch.int32)
        screened_head(part, engine.head, chosen, norm=engine.norm, eps=engine.eps, scored=scored)
        logits = torch.empty(len(part), engine.vocab_size)
        engine.logits(part, logits)
        same += int((logits.argmax(-1) == chosen).sum())
        tiles += int(scored.sum())
    return Agreement(tokens, same / tokens, tiles / (tokens * engine.head.data.shape[0]))
