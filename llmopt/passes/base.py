"""What a pass is: it checks whether it applies, and applies as a reversible patch.

A patch is a list of attribute swaps on objects of the one model given. Switching a patch off and on again is a handful
of pointer assignments, and that is what lets the loop time "with" and "without" in interleaved rounds, leave one pass out,
and give back a bit-exact model.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import nn

from llmopt.models.base import ResolvedModel

_ABSENT: Any = object()


class Phase(IntEnum):
    """Order of the passes. Order follows from the phase, never from one pass knowing another."""

    QUANTIZE = 10
    ATTENTION = 20
    FUSE = 30
    COMPILE = 40
    RUNTIME = 50


@dataclass(slots=True)
class Swap:
    """One attribute of one object and its new value.

    The value before is read each time the swap is made, so patches may be switched on in any subset, as long as they are
    switched off in the reverse order.
    """

    owner: Any
    attr: str
    after: Any
    before: Any = _ABSENT  # _ABSENT: not set on the instance (or not switched on yet)

    def make(self) -> None:
        self.before = self._current()
        setattr(self.owner, self.attr, self.after)

    def undo(self) -> None:
        if self.before is _ABSENT:
            delattr(self.owner, self.attr)
        else:
            setattr(self.owner, self.attr, self.before)

    def _current(self) -> Any:
        registered = isinstance(self.owner, nn.Module) and any(
            self.attr in table for table in (self.owner._modules, self.owner._parameters, self.owner._buffers)
        )
        if registered or isinstance(getattr(type(self.owner), self.attr, None), property):
            return getattr(self.owner, self.attr)
        return vars(self.owner).get(self.attr, _ABSENT)


class Patch:
    """Reversible edits, switched as one. Starts switched off.

    Args:
        swaps: the edits.
        on_enable: called when they have been made.
        on_disable: called before they are undone.
    """

    def __init__(
        self, swaps: Iterable[Swap] = (), on_enable: Callable[[], None] | None = None,
        on_disable: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.swaps = list(swaps)
        self.enabled = False
        self._on_enable, self._on_disable = on_enable, on_disable

    def enable(self) -> None:
        """Make all edits, or none if one fails."""
        if self.enabled:
            return
        made: list[Swap] = []
        try:
            for swap in self.swaps:
                swap.make()
                made.append(swap)
            if self._on_enable is not None:
                self._on_enable()
        except BaseException:
            for swap in reversed(made):
                swap.undo()
            raise
        self.enabled = True

    def disable(self) -> None:
        """Undo all edits, last first."""
        if not self.enabled:
            return
        if self._on_disable is not None:
            self._on_disable()
        for swap in reversed(self.swaps):
            swap.undo()
        self.enabled = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Does the pass apply to this model on this machine? If not, the reason is shown to the user."""

    applies: bool
    reason: str = ""


@dataclass(slots=True)
class Coverage:
    """What a pass touched, so that nothing is skipped in silence."""

    weight_bytes_before: int = 0  # bytes of the weights it replaced, as they were
    weight_bytes_after: int = 0
    share_of_weight_bytes: float = 0.0  # of all weight bytes of the model before the pass
    touched: int = 0  # number of modules
    implementations: dict[str, str] = field(default_factory=dict)  # what really runs, by site kind
    skipped: dict[str, str] = field(default_factory=dict)  # module or kind -> reason


@dataclass(slots=True)
class Applied:
    """The result of applying a pass: a patch (not yet enabled), what it covers, and facts for the receipt."""

    patch: Patch
    coverage: Coverage
    details: dict[str, Any] = field(default_factory=dict)  # JSON-serialisable
    changes_numerics: bool = False  # True: outputs differ by design (quantization), so a quality budget applies
    settled: dict[str, Any] = field(default_factory=dict)  # options a trial decided, saved in place of the pass's


@dataclass(frozen=True, slots=True)
class Event:
    """Progress, for ``on_event``. ``total`` is 0 when unknown."""

    kind: str  # "stage" | "progress" | "warning" | "verdict"
    name: str  # pass or step
    message: str = ""
    done: int = 0
    total: int = 0


@dataclass(slots=True)
class PassContext:
    """What a pass may use. It must not change the model other than through the patch it returns."""

    resolved: ResolvedModel
    device: torch.device
    emit: Callable[[Event], None]
    calibration: Any = None  # list of 1-D int64 token tensors, made by passes.quantize_gptq.calibrate
    seed: int = 0
    prompt_tokens: int = 128  # the depth at which decode is measured
    timed: bool = True  # False: the caller wants no measurements, so no long ones for a choice either
    trials: bool = True  # False: as recorded with the model; options that are given need no trial again

    @property
    def model(self) -> nn.Module:
        return self.resolved.model

    @property
    def config(self) -> Any:
        return self.resolved.model.config


class Pass(ABC):
    """One optimization. Subclasses are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]
    phase: ClassVar[Phase]
    needs_calibration: ClassVar[bool] = False
    must_gain: ClassVar[bool] = False  # undone also where no gain is found: it costs something every time it is applied

    def options(self) -> dict[str, Any]:
        """The fields and their values, JSON-serialisable."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}

    @classmethod
    def option_names(cls) -> list[str]:
        """What may be given when a pass of this kind is made."""
        return [f.name for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []

    @abstractmethod
    def check(self, ctx: PassContext) -> Verdict:
        """Decide without touching anything. Bad options raise InputError."""

    @abstractmethod
    def apply(self, ctx: PassContext) -> Applied:
        """Build what replaces the model's parts. The model itself stays as it is until the patch is enabled."""
