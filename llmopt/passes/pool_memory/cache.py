"""A KV cache that is allocated whole, for models that the engine does not decode."""

from __future__ import annotations

from typing import Any

from llmopt.models.base import ResolvedModel
from llmopt.runtime.cache import CACHE, KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.generate import generation_behind, sequences_of, wants_plain_cache


class Prepared:
    """Stands in for ``model._prepare_cache_for_generation``: gives our cache in place of one that grows with every token.

    Args:
        resolved: the model.

    Raises:
        UnsupportedModelError: a part whose cache is not ours.
    """

    def __init__(self, resolved: ResolvedModel) -> None:
        self._model: Any = resolved.model
        # not the engine: it would hold on to weights
        self._options = Engine(resolved).cache_options()

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        generation = generation_behind(vars(self._model).get("generate"))
        if generation is not None or args or kwargs or not wants_plain_cache(generation_config, model_kwargs):
            given = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args)
            if generation is not None:
                return generation.prepare_cache(*given, **kwargs)
            return type(self._model)._prepare_cache_for_generation(self._model, *given, **kwargs)
        sequences = sequences_of(generation_config, batch_size)
        model_kwargs[CACHE] = KVCache(
            sequences, capacity=max_cache_length + 1, **{**self._options, "device": self._model.device}
        )  # fmt: skip
        return None
