"""What llmopt knows of a model it has optimized, kept on that model, so that both go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmopt.errors import InputError
from llmopt.measure.report import Report
from llmopt.models.base import ResolvedModel
from llmopt.originals import Originals
from llmopt.passes.base import Applied, Pass
from llmopt.stages import Stages

_ATTR = "_llmopt_state"


@dataclass(slots=True)
class State:
    """One optimized model."""

    resolved: ResolvedModel
    stages: Stages
    kept: list[tuple[Pass, Applied]]
    originals: Originals
    report: Report

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # a copy of the model is a model of its own: what could restore it stays with the one that was optimized
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """What a pickled state becomes."""


def is_optimized(model: Any) -> bool:
    """llmopt has optimized this very object, and not restored it."""
    return isinstance(getattr(model, "__dict__", {}).get(_ATTR), State)


def remember(model: Any, state: State) -> None:
    # past nn.Module.__setattr__, which is for parameters and modules; the cycle this makes is one the collector knows
    vars(model)[_ATTR] = state


def forget(model: Any) -> None:
    del vars(model)[_ATTR]


def state_of(model: Any) -> State:
    """The state of an optimized model.

    Raises:
        InputError: it is not optimized.
    """
    if not is_optimized(model):
        raise InputError("model: not optimized by llmopt in this process (or restored since)")
    state: State = vars(model)[_ATTR]
    return state
