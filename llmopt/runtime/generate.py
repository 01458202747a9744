"""The loop behind ``generate``: a recorded step, and a few Python calls a token.

transformers prepares everything (arguments, processors, stopping criteria, cache) and then runs a decoding method; for greedy
search and for sampling, with prompt lookup or without, we hand it ours, as its ``custom_generate``. Beam search and what
else is not covered stay transformers' own, on the same modules.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch

from llmopt.runtime import fallbacks
from llmopt.runtime.cache import CACHE, KVCache
from llmopt.runtime.decoding import Decoding
from llmopt.runtime.engine import Engine
from llmopt.runtime.lookup import COUNTS, MOST_GUESSES, Lookup
from llmopt.runtime.masks import rope_positions, visible_tokens
from llmopt.runtime.step import DecodeStep

# caches that a pooled engine keeps, each of another number of sequences
_MOST_IDLE = 4


class EngineSource(Protocol):
    """Where the engine comes from.

    Attributes:
        pooled: as of :class:`~llmopt.runtime.engine.Engine`; :meth:`forget` when that changes.
    """

    pooled: bool

    def get(self) -> Engine:
        """The engine for the modules as they are now."""

    def forget(self) -> None:
        """Modules or tensors have changed, or options have."""


class Generation:
    """Stands in for ``model.generate`` and ``model._prepare_cache_for_generation``.

    Args:
        model: the causal LM.
        source: of the engine.
        lookup: prompt lookup for calls that do not ask for it themselves, or None.

    Attributes:
        lookup_counts: of all calls so far, by the names in :data:`~llmopt.runtime.lookup.COUNTS`.
        own_loops: reason -> calls that transformers' own loop decoded, over the same modules.
    """

    def __init__(self, model: Any, source: EngineSource, lookup: Lookup | None = None) -> None:
        self._model, self._source, self.lookup = model, source, lookup
        self.lookup_counts = dict.fromkeys(COUNTS, 0)
        self.own_loops: dict[str, int] = {}
        self._own_generate = model.generate
        self._own_sample = model._sample
        self._own_assisted = model._assisted_decoding
        self._own_prepare = model._prepare_cache_for_generation
        self._idle: list[DecodeStep] = []

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model starts without the memory of this one
        return {**vars(self), "_idle": []}

    def engine(self) -> Engine:
        """The engine for the modules as they are now."""
        return self._source.get()

    def forget(self) -> None:
        """Drop the kept cache and its recorded step: they hold on to the weights of the engine they were made for."""
        self._idle = []

    def changed(self, *, pooled: bool | None = None) -> None:
        """Tensors of the model lie elsewhere now, or the engine is to be another in this."""
        if pooled is not None:
            self._source.pooled = pooled
        self._source.forget()
        self.forget()

    # ---- the cache

    def prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Give ``generate`` our cache where it would make a plain dynamic one."""
        if args or kwargs or not wants_plain_cache(generation_config, model_kwargs):
            return self._own_prepare(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
            )
        sequences = sequences_of(generation_config, batch_size)
        # transformers leaves out the last token; a step wants a slot for it, and one more
        model_kwargs[CACHE] = self._take_cache(sequences, max_cache_length + 2)
        return None

    def _take_cache(self, sequences: int, capacity: int) -> KVCache:
        engine = self.engine()
        for step in list(self._idle):
            cache = step.cache
            fits = step.fits(cache, engine)
            if fits and self._source.pooled and cache.sequences != sequences:
                continue
            # what does not fit goes, before as much memory is asked for again
            if self._taken(step) and fits and cache.sequences == sequences and step.capacity >= capacity:
                cache.reset()
                cache.step = step
                return cache
            del step, cache
        return engine.new_cache(sequences, capacity)

    def _taken(self, step: DecodeStep) -> bool:
        """True for one of the callers that want an idle step, who may be in several threads."""
        try:
            self._idle.remove(step)
        except ValueError:
            return False
        return True

    def _keep(self, step: DecodeStep) -> None:
        """For the next call of as many sequences: the last step alone, or, pooled, the last of each of some sizes."""
        if not self._source.pooled:
            self._idle = [step]
            return
        # one by one: a list that is made anew could bring back a step that another caller has taken meanwhile
        self._idle.append(step)
        same = [idle for idle in self._idle if idle is not step and idle.cache.sequences == step.cache.sequences]
        for idle in (*same, *[idle for idle in self._idle if idle not in same][:-_MOST_IDLE]):
            self._taken(idle)

    # ---- the loop

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with the same arguments and results."""
        if reason := _other_loop(self._model, args, kwargs):
            # one of ours underneath counts it itself, and one of ours above decodes it
            above = getattr(kwargs.get("custom_generate"), "__module__", "") == __name__
            if not above and generation_behind(self._own_generate) is None:
                self._count(reason)
            return self._own_generate(*args, **kwargs)
        # transformers gives a custom method neither the streamer nor, for stop strings, the tokenizer
        streamer, strings = kwargs.get("streamer"), kwargs.pop("stop_strings", None)
        if strings is not None:
            kwargs["stopping_criteria"] = _with_stop_strings(strings, kwargs)

        def method(
            model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            synced_gpus: bool = False, **model_kwargs: Any,
        ) -> Any:  # fmt: skip
            return self.sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )

        return self._own_generate(*args, **kwargs, custom_generate=method)

    def sample(
        self, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        synced_gpus: bool = False, streamer: Any = None, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """``GenerationMixin._sample`` with the same arguments and results, or ``_assisted_decoding`` for prompt lookup."""
        cache: Any = model_kwargs.get(CACHE)
        asked = generation_config.prompt_lookup_num_tokens is not None
        reason = _uncovered(generation_config, synced_gpus, input_ids, model_kwargs)
        if asked and len(input_ids) > 1:
            reason = "prompt lookup for a batch"  # which transformers refuses, and so it is refused here
        if reason:
            self._count(reason)
            own, more = (self._own_assisted, {"inputs_tensor": input_ids}) if asked else (self._own_sample, {})
            return own(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced_gpus,
                streamer=streamer, **more, **model_kwargs,
            )  # fmt: skip
        lookup = _lookup_of(generation_config) if asked else self.lookup
        loop = Decoding(self.engine(), cache, input_ids, model_kwargs, generation_config)
        if lookup is not None and len(input_ids) == 1:
            loop.lookup, loop.counts = lookup, self.lookup_counts
        result = loop.run(logits_processor, stopping_criteria, streamer)
        if not (generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)):
            self._keep(loop.step)
        return result

    def _count(self, reason: str) -> None:
        fallbacks.count(self.own_loops, reason, "llmopt: transformers' own loop decodes")


def wants_plain_cache(config: Any, model_kwargs: dict[str, Any]) -> bool:
    """True where ``generate`` would make a cache that grows."""
    return (
        model_kwargs.get(CACHE) is None
        and config.use_cache is not False
        and config.cache_implementation in (None, "dynamic")
        and not getattr(config, "is_assistant", False)
    )


def sequences_of(config: Any, batch_size: int) -> int:
    """Sequences that are decoded for a batch."""
    return batch_size * int(max(config.num_beams, config.num_return_sequences))


def engine_of(model: Any) -> Engine | None:
    """The engine behind ``model.generate`` as it is now, or None."""
    generation = generation_behind(vars(model).get("generate"))
    return None if generation is None else generation.engine()


def generation_behind(generate: Any) -> Generation | None:
    """The one whose method ``generate`` is, or None."""
    owner = getattr(generate, "__self__", None)
    return owner if isinstance(owner, Generation) else None


def _other_loop(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call is neither greedy search nor sampling, prompt lookup or not, as transformers will tell them; or ''."""
    from transformers.generation.configuration_utils import GenerationMode

    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    config = copy.deepcopy(model.generation_config if given is None else given)
    if len(args) > 2:
        return "more than two positional arguments"
    for name in ("custom_generate", "assistant_model", "synced_gpus"):
        if kwargs.get(name) not in (None, False):
            return f"{name} is given"
    if config.stop_strings is not None:
        return "stop strings in a generation config"
    config.update(**{k: v for k, v in kwargs.items() if k != "generation_config" and hasattr(config, k)})
    config.prompt_lookup_num_tokens = None
    mode = config.get_generation_mode()
    return "" if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) else f"generation mode {mode.value}"


def _lookup_of(config: Any) -> Lookup:
    """Transformers' own options for prompt lookup.

    Raises:
        ValueError: not positive, as transformers says it.
    """
    guesses, ngram = config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2
    if guesses <= 0 or ngram <= 0:
        raise ValueError("Invalid max_matching_ngram_size or num_output_tokens")
    return Lookup(min(guesses, MOST_GUESSES), ngram)


def _with_stop_strings(strings: Any, kwargs: dict[str, Any]) -> Any:
    """The caller's stopping criteria and one for the stop strings.

    Raises:
        ValueError: no tokenizer was given, as transformers says it.
    """
    from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

    tokenizer = kwargs.get("tokenizer")
    if tokenizer is None:
        raise ValueError("stop_strings: generate() needs tokenizer= as well, to find them in the tokens")
    given = kwargs.get("stopping_criteria")
    return StoppingCriteriaList([*(given or []), StopStringCriteria(tokenizer, strings)])


def _uncovered(config: Any, synced_gpus: bool, ids: torch.Tensor, kwargs: dict[str, Any]) -> str:
    """Why the loop cannot serve a call, or ''."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, KVCache) or kwargs.get("use_cache") is False:
        return "no cache of ours"
    if synced_gpus or getattr(config, "is_assistant", False) or config.prefill_chunk_size is not None:
        return "synced GPUs, an assistant model or chunked prefill"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attention weights or hidden states are asked for"
    if kwargs.get("inputs_embeds") is not None or ids.device != cache.device or ids.shape[0] != cache.sequences:
        return "embeddings, another device or another batch size"
    if ids.shape[1] <= cache.length:
        return "no new tokens"
    given = kwargs.get("position_ids")
    if given is not None:
        usual = rope_positions(kwargs.get("attention_mask"), ids.shape, ids.device)
        if given.shape[-1] > ids.shape[1] or not bool((given == usual[:, -given.shape[-1] :]).all()):
            return "positions of the caller's own"
    return visible_tokens(kwargs.get("attention_mask"), ids.shape[1] - cache.length, cache)[0]
