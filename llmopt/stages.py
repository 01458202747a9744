"""Brings one model into any of its stages: baseline, stock, or any subset of its patches, and back as it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmopt.passes.base import Patch

EAGER = ("eager", "eager")
STOCK = ("sdpa", "grouped_mm")  # transformers' own defaults


class Stages:
    """Switches patches and implementations of one model. The model starts, and ends, as it was given.

    Args:
        model: a transformers model; its config's attention and experts implementation are what ``given`` records.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.given: tuple[str, str] = self._implementations()
        self._shown: tuple[Patch, ...] = ()
        self._over = self.given

    def _implementations(self) -> tuple[str, str]:
        config = self.model.config
        return config._attn_implementation, config._experts_implementation

    def _set(self, implementations: tuple[str, str]) -> None:
        config = self.model.config
        config._attn_implementation, config._experts_implementation = implementations

    def show(self, patches: Sequence[Patch], implementations: tuple[str, str] | None = None) -> Any:
        """The model with exactly these patches on, over these implementations (default: as given)."""
        wanted = implementations or self.given
        if (tuple(patches), wanted) != (self._shown, self._over) or not patches:
            for patch in reversed(self._shown):
                patch.disable()
            self._shown = ()
            self._set(wanted)
            self._over = wanted
            for patch in patches:
                patch.enable()
                self._shown = (*self._shown, patch)
        return self.model

    def stage(self, patches: Sequence[Patch], implementations: tuple[str, str] | None = None) -> Callable[[], Any]:
        """A function that shows the stage, for the timing loop."""
        return lambda: self.show(patches, implementations)

    def as_given(self) -> Any:
        """Everything off."""
        return self.show(())
