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

_ATTR, _INHERITED = "_llmopt_state", "_llmopt_inherited"


@dataclass(slots=True)
class Inherited:
    """What a model has from where it came: a checkpoint that :func:`llmopt.load` read, or an optimized model it is a copy of.

    Nothing of it is undone: the checkpoint, or the model that was copied, can be had without the passes.
    """

    passes: dict[str, dict[str, Any]]  # name -> options, in run order: those in the weights, and those applied beside
    applied: dict[str, dict[str, Any]] = field(default_factory=dict)  # beside the weights: name -> details
    notes: list[str] = field(default_factory=list)  # for the receipt
    recorded: dict[str, Any] | None = None  # the receipt it came with
    copied: bool = False
    _report: Report | None = None

    def report(self) -> Report:
        """The receipt it came with, with what the passes do in this process as ``details``.

        Raises:
            InputError: there is none, or it is of a version of llmopt with other receipts.
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

    def without(self) -> str:
        """How to have the model without the passes that are applied to it, for an error."""
        if self.copied:
            return "it is a copy of an optimized model; llmopt.restore that one, then copy it"
        return "it was loaded; llmopt.load(directory, passes=None) gives it without what load applies"

    def __reduce__(self) -> tuple[Any, ...]:
        # by deepcopy and pickle; details that count are those of the model that was copied
        return Inherited, (self.passes, {name: {} for name in self.applied}, self.notes, self.recorded, self.copied)


@dataclass(slots=True)
class State:
    """One optimized model. What could restore it does not go into copies: they have :class:`Inherited` in its place."""

    resolved: ResolvedModel
    stages: Stages
    kept: list[tuple[Pass, Applied]]
    originals: Originals
    report: Report

    def __reduce__(self) -> tuple[Any, ...]:
        # by deepcopy and pickle; what load has applied is not here, for optimize refuses that
        applied: dict[str, dict[str, Any]] = {item.name: {} for item, _ in self.kept if not item.needs_calibration}
        note = "copied: figures are those of the model it is a copy of"
        return Inherited, (active_passes(self.resolved.model), applied, [note], self.report.to_dict(), True)


def is_optimized(model: Any) -> bool:
    """llmopt has optimized this very object, and not restored it."""
    return isinstance(getattr(model, "__dict__", {}).get(_ATTR), State)


def remember(model: Any, state: State) -> None:
    # past nn.Module.__setattr__, which is for parameters and modules; the cycle this makes is one the collector knows
    vars(model)[_ATTR] = state


def forget(model: Any) -> None:
    del vars(model)[_ATTR]


def inherit(model: Any, inherited: Inherited) -> None:
    vars(model)[_INHERITED] = inherited


def inherited_by(model: Any) -> Inherited | None:
    """What the model has from where it came, if that was a checkpoint of ours or a model that was optimized."""
    attributes = getattr(model, "__dict__", {})
    # of a copy it lies where the state of the model that was copied lay
    places = (attributes.get(_ATTR), attributes.get(_INHERITED))
    return next((found for found in places if isinstance(found, Inherited)), None)


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
    inherited = inherited_by(model)
    active = {} if inherited is None else dict(inherited.passes)
    if is_optimized(model):
        active |= {item.name: {**item.options(), **applied.settled} for item, applied in state_of(model).kept}
    return active
