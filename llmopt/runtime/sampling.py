"""Sampling by one op (:mod:`llmopt.ops.sample_token`): which of transformers' processors it stands in for, and its tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from llmopt.ops.exponential_noise import exponential_noise
from llmopt.ops.sample_token import sample_token


class Settings(NamedTuple):
    """What sample_token takes of each sequence; what is left out filters nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def split(processors: Any) -> tuple[list[Any], Settings]:
    """The processors that have to run themselves, and what the last ones of a list amount to.

    Args:
        processors: transformers' list for a call that samples, in its order.
    """
    from transformers.generation import logits_process as hf

    kinds = {
        "temperature": hf.TemperatureLogitsWarper, "top_k": hf.TopKLogitsWarper, "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }  # fmt: skip
    first, found = list(processors), dict[str, Any]()
    # what is drawn does not depend on it
    if first and type(first[-1]) is hf.LogitNormalization:
        first.pop()
    for name, kind in reversed(kinds.items()):
        if first and type(first[-1]) is kind and _drops(first[-1]):
            found[name] = getattr(first.pop(), name)
    return first, Settings(**found)


def _drops(warper: Any) -> bool:
    """True where what is filtered cannot be drawn, and one token is enough."""
    return getattr(warper, "filter_value", -math.inf) == -math.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


class Sampling:
    """The tensors that tokens are drawn with, a row a sequence.

    Attributes:
        chosen: ``[S]`` int64, the tokens drawn last; -1 where none could be.
    """

    def __init__(self, sequences: int, vocab_size: int, device: torch.device) -> None:
        self._noise = torch.ones(sequences, vocab_size, device=device)
        self._settings = torch.empty(sequences, len(Settings._fields), device=device)
        self.chosen = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._generator = generator_of(device)
        self.use(Settings())

    def use(self, settings: Settings) -> None:
        """Draw by these from now on."""
        self._settings.copy_(torch.tensor(settings, dtype=torch.float32, device=self._settings.device))

    def renew(self) -> None:
        """Noise for the next token, from torch's generator, as ``torch.multinomial`` takes it for the same seed."""
        exponential_noise(self._noise, self._generator)

    def choose(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Draw ``chosen`` from ``[S, V]`` float32; ``ids`` [S] int64 are the same, but tokens in any case."""
        sample_token(logits, self._noise, self._settings, ids, self.chosen)

    def state(self) -> torch.Tensor:
        """Where the generator stands."""
        return self._generator.get_state()

    def restore(self, state: torch.Tensor) -> None:
        """Take back what was drawn since."""
        self._generator.set_state(state)


def generator_of(device: torch.device) -> torch.Generator:
    """The one that torch draws from on a device by default."""
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    found: torch.Generator = torch.cuda.default_generators[index]
    return found


def drawn(chosen: torch.Tensor) -> torch.Tensor:
    """The same, where every token could be drawn.

    Raises:
        RuntimeError: of a sequence none could, as torch says it.
    """
    if bool((chosen < 0).any()):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    return chosen
