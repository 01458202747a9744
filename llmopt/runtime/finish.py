"""When a call of ``generate`` ends: end tokens and the longest length are looked at here, other criteria are called."""

from __future__ import annotations

from typing import Any

import torch


def only_delays_end(processors: Any) -> bool:
    """True when all that the processors may do is to forbid the end token for a while (``min_new_tokens``)."""
    from transformers.generation.logits_process import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor

    return all(type(p) in (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor) for p in processors)


class Finish:
    """Which sequences are done. The end token and the longest length are looked at here, other criteria are called."""

    def __init__(self, criteria: Any, config: Any, ids: torch.Tensor) -> None:
        from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

        self.ids = ids
        self._lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self._ends = {int(t) for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.reshape(-1)}
        self._others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self._pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self._pad: torch.Tensor = config._pad_token_tensor
        if self._pad is not None:
            self._pad = self._pad.to(ids.device)
        self._done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        self._any_done = False

    @property
    def looks_at_tokens_alone(self) -> bool:
        """True when no criterion of the caller's is called."""
        return not self._others

    def holds_end(self, tokens: torch.Tensor) -> bool:
        """True when a sequence that is not done has come to an end token."""
        if self._ends.isdisjoint(tokens.tolist()):
            return False
        done = self._done.tolist() if self._any_done else [False] * len(tokens)
        return any(token in self._ends for token, over in zip(tokens.tolist(), done, strict=True) if not over)

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sequences that are done continue with padding."""
        if not self._any_done or not self._pads:
            return tokens
        return torch.where(self._done, self._pad, tokens)

    def after(self, tokens: torch.Tensor, length: int, scores: Any) -> bool:
        """True when every sequence is done."""
        ended = [i for i, token in enumerate(tokens.tolist()) if token in self._ends] if self._ends else []
        if ended:
            self._done[ended] = True
            self._any_done = True
        if any(length >= most for most in self._lengths):
            return True
        for criterion in self._others:
            self._done |= criterion(self.ids[:, :length], scores)
            self._any_done = True
        return self._any_done and bool(self._done.all())
