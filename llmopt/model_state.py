"""What llmopt knows of a model it has optimized or loaded, kept on that model, so that both go together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from llmopt.errors import InputError
from llmopt.measure.report import Report
from llmopt.models.base import ResolvedModel
from llmopt.originals import Originals
from llmopt.passes.base import Applied, Pass
from llmopt.stages import Stages

_ATTR, _LOADED = "_llmopt_state", "_llmopt_loaded"


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


@dataclass(slots=True)
class Loaded:
    """A model as :func:`llmopt.load` gave it. Nothing of it is undone: its checkpoint has the model without the passes."""

    passes: dict[str, dict[str, Any]]  # name -> options, in run order: those in the weights, and those applied again
    applied: dict[str, dict[str, Any]] = field(default_factory=dict)  # again, by load: name -> details
    notes: list[str] = field(default_factory=list)  # for the receipt
    recorded: dict[str, Any] | None = None  # the receipt saved with the checkpoint
    _report: Report | None = None

    def report(self) -> Report:
        """The receipt that was saved, with what the passes do in this process as ``details``.

        Raises:
            InputError: none was saved, or by a version of llmopt with other receipts.
        """
        if self._report is None:
            if self.recorded is None:
                raise InputError(
                    "model: loaded from a checkpoint without a receipt; llmopt.compare measures it as it is"
                )
            self._report = Report.from_json(json.dumps(self.recorded))
            self._report.notes += [note for note in self.notes if note not in self._report.notes]
            for row in self._report.passes:
                row.details |= self.applied.get(row.name, {})
        return self._report

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        # details that count are those of the model that was copied
        return Loaded(self.passes, {name: {} for name in self.applied}, self.notes, self.recorded)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def is_optimized(model: Any) -> bool:
    """llmopt has optimized this very object, and not restored it."""
    return isinstance(getattr(model, "__dict__", {}).get(_ATTR), State)


def remember(model: Any, state: State) -> None:
    # past nn.Module.__setattr__, which is for parameters and modules; the cycle this makes is one the collector knows
    vars(model)[_ATTR] = state


def forget(model: Any) -> None:
    del vars(model)[_ATTR]


def remember_loaded(model: Any, loaded: Loaded) -> None:
    vars(model)[_LOADED] = loaded


def loaded_from(model: Any) -> Loaded | None:
    """What :func:`llmopt.load` did, if the model came from there."""
    found = getattr(model, "__dict__", {}).get(_LOADED)
    return found if isinstance(found, Loaded) else None


def state_of(model: Any) -> State:
    """The state of an optimized model.

    Raises:
        InputError: it is not optimized.
    """
    if not is_optimized(model):
        raise InputError("model: not optimized by llmopt in this process (or restored since)")
    state: State = vars(model)[_ATTR]
    return state


def active_passes(model: Any) -> dict[str, dict[str, Any]]:
    """What is done to the model now, in run order: name -> options, as a trial settled them."""
    loaded = loaded_from(model)
    active = {} if loaded is None else dict(loaded.passes)
    if is_optimized(model):
        active |= {item.name: {**item.options(), **applied.settled} for item, applied in state_of(model).kept}
    return active
