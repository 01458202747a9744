"""What llmopt knows of the models it has optimized in this process. Nothing is stored on the models themselves."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from llmopt.errors import InputError
from llmopt.measure.report import Report
from llmopt.models.base import ResolvedModel
from llmopt.originals import Originals
from llmopt.passes.base import Applied, Pass
from llmopt.stages import Stages


@dataclass(slots=True)
class State:
    """One optimized model."""

    resolved: ResolvedModel
    stages: Stages
    kept: list[tuple[Pass, Applied]]
    originals: Originals
    report: Report


STATES: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()


def state_of(model: Any) -> State:
    """The state of an optimized model.

    Raises:
        InputError: it is not optimized.
    """
    if model not in STATES:
        raise InputError("model: not optimized by llmopt in this process (or restored since)")
    return STATES[model]
