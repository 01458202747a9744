"""Where the baseline's times come from: the model itself, or as many of its layers as fit into memory, scaled."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

from llmopt.errors import InputError
from llmopt.measure.timing import Samples
from llmopt.stages import EAGER, STOCK, Stages

Show = Callable[[], Any]


class Baseline(Protocol):
    """Gives the baseline stages of the timing ladder, and turns their samples into those of "eager" and "stock"."""

    note: str  # for the receipt, or ""
    weight_bytes: int | None  # of the whole model in its own dtype; None: those of the model measured
    parameters: int | None  # likewise

    def ladder(self) -> dict[str, Show]: ...

    def combine(self, samples: dict[str, Samples]) -> dict[str, Samples]: ...

    def close(self) -> None: ...


class OwnBaseline:
    """The model measured against itself with all patches off."""

    note = ""
    weight_bytes: int | None = None
    parameters: int | None = None

    def __init__(self, stages: Stages) -> None:
        stock = stages.given if stages.given != EAGER else STOCK
        self._ladder: dict[str, Show] = {"eager": stages.stage((), EAGER), "stock": stages.stage((), stock)}

    def ladder(self) -> dict[str, Show]:
        return self._ladder

    def combine(self, samples: dict[str, Samples]) -> dict[str, Samples]:
        return samples

    def close(self) -> None:
        return None


class ScaledBaseline:
    """A model too large for memory in its own dtype, timed on its first layers at two depths and extended linearly.

    Time is taken as a constant (embedding, head, Python around the layers) plus a cost a layer. The two depths hold the
    same leading dense layers, so that the difference between them is that of the repeating layers. Both are the same
    model: the smaller depth runs fewer of its layers.

    Args:
        shape: published shape.
        layers: the larger depth.
        fewer: the smaller depth.
        total: layers of the whole model.
    """

    def __init__(self, shape: str, *, layers: int, fewer: int, total: int, seed: int = 0) -> None:
        from llmopt.models import shapes

        if not 0 < fewer < layers <= total:
            raise InputError(f"layers: expected 0 < fewer < layers <= {total}, got {fewer} and {layers}")
        self.layers, self.fewer, self.total = layers, fewer, total
        whole = shapes.meta_model(shape)
        self.parameters: int | None = sum(p.numel() for p in whole.parameters())
        self._model: Any = shapes.build(shape, num_layers=layers, seed=seed)
        size = shapes.parameter_bytes(whole.config)
        self.weight_bytes: int | None = size
        self.note = (
            f"the bfloat16 model ({size / 1e9:.1f} GB) does not fit into memory: its baseline was measured "
            f"on {layers} and {fewer} of {total} layers, in the same rounds, and scaled by layers"
        )

    def ladder(self) -> dict[str, Show]:
        return {
            self._name(kind, depth): self._show(implementations, depth)
            for kind, implementations in (("eager", EAGER), ("stock", STOCK))
            for depth in (self.layers, self.fewer)
        }

    def _name(self, kind: str, depth: int) -> str:
        return f"{kind}, {depth} layers"

    def _show(self, implementations: tuple[str, str], depth: int) -> Show:
        def show() -> Any:
            config = self._model.config
            config._attn_implementation, config._experts_implementation = implementations
            config.num_hidden_layers = depth
            return self._model

        return show

    def combine(self, samples: dict[str, Samples]) -> dict[str, Samples]:
        combined = dict(samples)
        for kind in ("eager", "stock"):
            many = combined.pop(self._name(kind, self.layers))
            few = combined.pop(self._name(kind, self.fewer))
            combined[kind] = Samples(
                self._extend(many.prefill_ms, few.prefill_ms), self._extend(many.decode_ms, few.decode_ms)
            )
        return combined

    def _extend(self, many: list[float], few: list[float]) -> list[float]:
        rest = (self.total - self.layers) / (self.layers - self.fewer)
        return [a + rest * (a - b) for a, b in zip(many, few, strict=True)]

    def close(self) -> None:
        """Free the layers."""
        self._model = None
        gc.collect()
