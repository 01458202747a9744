"""One call of ``generate``, after transformers has prepared it: prefill, then a recorded step a token."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.runtime.ahead import AHEAD, Ahead
from llmopt.runtime.cache import CACHE, KVCache
from llmopt.runtime.engine import Engine
from llmopt.runtime.finish import Finish, only_delays_end
from llmopt.runtime.lookup import Lookup, Speculation
from llmopt.runtime.sampling import Sampling, Settings, drawn, split
from llmopt.runtime.step import DecodeStep


class Decoding:
    """Decodes a batch to its end.

    Args:
        engine: the model.
        cache: of the batch; what it holds is not run again.
        input_ids: ``[S, T]`` int64, the prompt, with what the cache holds.
        kwargs: transformers' model inputs.
        config: transformers' generation config of this call.

    Attributes:
        lookup: prompt lookup, for a single sequence; set before :meth:`run`, with its ``counts``.
        step: the recorded step, for the next call.
    """

    def __init__(
        self, engine: Engine, cache: KVCache, input_ids: torch.Tensor, kwargs: dict[str, Any], config: Any
    ) -> None:
        self.engine, self.cache, self.config = engine, cache, config
        self.prompt = input_ids.shape[1]
        self.ids, self.length = input_ids, self.prompt
        self.mask = kwargs.get("attention_mask")
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        self.lookup: Lookup | None = None
        self.counts: dict[str, int] = {}
        self.speculation: Speculation | None = None
        # what the last step has chosen
        self.choice: torch.Tensor | None = None
        # steps run ahead of this loop, which has the tokens on the CPU then
        self.ahead: Ahead | None = None
        self.device = input_ids.device

    @torch.no_grad()
    def run(self, processors: Any, criteria: Any, streamer: Any) -> Any:
        """Decode; what ``generate`` returns.

        Args:
            processors: transformers' logits processors.
            criteria: its stopping criteria.
            streamer: its streamer, or None.

        Raises:
            RuntimeError: logits that no token can be drawn from.
        """
        limit = min((c.max_length for c in criteria if hasattr(c, "max_length")), default=None)
        if limit is None:
            limit = self.prompt + 4096
        buffer = torch.empty(self.ids.shape[0], max(limit, self.prompt + 1), dtype=torch.int64, device=self.ids.device)
        buffer[:, : self.prompt] = self.ids
        self.ids = buffer
        logits = self.engine.prefill(self.ids[:, : self.prompt], self.mask, self.cache)
        self._choose_by(processors)
        self.step = self._step(limit)
        if self.lookup is not None:
            known = self.ids[0, : self.prompt].tolist()
            self.speculation = Speculation(self.engine, self.step, self.lookup, known, self.counts)
        finish = Finish(criteria, self.config, buffer)
        if self._may_run_ahead(finish):
            self.choice = (logits.argmax(-1) if self.plain else self._draw(logits)).cpu()
            self.ids = buffer.cpu()
            finish = Finish(criteria, self.config, self.ids)
            self.ahead = Ahead(self.step, self.choice)
        while True:
            tokens = finish.pad(self._next(logits, processors, finish))
            if self.length == self.ids.shape[1]:
                self.ids = finish.ids = torch.cat([self.ids, torch.empty_like(self.ids)], -1)
            self.ids[:, self.length] = tokens
            self.length += 1
            done = finish.after(tokens, self.length, tuple(self.scores) or None)
            if streamer is not None:
                streamer.put(tokens.cpu())  # as transformers does: a streamer reads them
            if done:
                break
            logits = self._decode(tokens)
        if self.ahead is not None:
            self.ahead.end()
        if streamer is not None:
            streamer.end()
        self.cache.step = None
        return self._result()

    # ---- how tokens are chosen

    def _choose_by(self, processors: Any) -> None:
        """``plain``: the largest logit, and nobody looks at the others. ``settings``: drawn by our op, after ``first``.

        With settings and nothing before them the step draws; with prompt lookup, or processors first, it is done here.
        """
        config = self.config
        shown = config.return_dict_in_generate  # scores are asked for, as transformers computes them
        self.plain = not config.do_sample and not shown and only_delays_end(processors)
        self.settings: Settings | None = None
        if config.do_sample and not shown:
            first, self.settings = split(processors)
            self.first = type(processors)(first)
        self.in_step = self.settings is not None and not self.first and self.lookup is None
        if self.settings is not None and not self.in_step:
            self.sampling = Sampling(len(self.ids), self.engine.vocab_size, self.device)
            self.sampling.use(self.settings)

    def _may_run_ahead(self, finish: Finish) -> bool:
        """True where nobody needs a token before the step after it can begin, and the device runs by itself."""
        chosen = self.plain or self.in_step
        return chosen and self.device.type in AHEAD and self.speculation is None and finish.looks_at_tokens_alone

    def _next(self, logits: torch.Tensor, processors: Any, finish: Finish) -> torch.Tensor:
        """Tokens that follow, ``[S]`` int64, of the last logits."""
        if self.plain:
            tokens = logits.argmax(-1) if self.choice is None else self.choice
            return self._choose(logits, processors) if len(processors) and finish.holds_end(tokens) else tokens
        if self.in_step:
            return self._draw(logits) if self.choice is None else self.choice
        return self._choose(logits, processors)

    def _choose(self, logits: torch.Tensor, processors: Any) -> torch.Tensor:
        config = self.config
        keep = config.return_dict_in_generate
        if self.ahead is not None:
            logits = self._run_again(logits)
        elif self.choice is not None:
            (self.step if self.speculation is None else self.speculation.last).complete()
        raw = logits if self.choice is None else logits.clone()  # a step's are gone with the next one
        ids = self.ids[:, : self.length].to(raw.device)
        if self.settings is not None:
            return self._draw(self.first(ids, raw))
        scores: torch.Tensor = processors(ids, raw.clone() if keep and config.output_logits else raw)
        if keep and config.output_scores:
            self.scores.append(scores)
        if keep and config.output_logits:
            self.logits.append(raw)
        if config.do_sample:
            return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        if self.ahead is None:
            return scores.argmax(-1)
        tokens = scores.argmax(-1).cpu()
        self.step.start(self.cache.length - self.cache.start)
        self.ahead = Ahead(self.step, tokens)
        return tokens

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        self.sampling.renew()
        self.sampling.choose(scores.float().contiguous(), torch.empty_like(self.sampling.chosen))
        return drawn(self.sampling.chosen)

    # ---- steps

    def _step(self, limit: int) -> DecodeStep:
        self.cache.reserve(min(limit, self.prompt + 4096) + 1)
        step: DecodeStep | None = getattr(self.cache, "step", None)
        settings = self.settings if self.in_step else None
        if step is None or not step.fits(self.cache, self.engine):
            step = DecodeStep(self.engine, self.cache, greedy=self.plain, settings=settings)
        else:
            step.choose_by(greedy=self.plain, settings=settings)
        if step.sampling is not None:
            self.sampling = step.sampling
        step.start(self.cache.length - self.cache.start)
        return step

    def _run_again(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that the next token is chosen from, which steps that ran ahead have overwritten."""
        if self.length == self.prompt:
            return logits
        self.cache.length = self.length - 1
        self.step.start(self.cache.length - self.cache.start)
        self.step.ids.copy_(self.ids[:, self.length - 1])
        self.step.run()
        self.step.complete()
        self.cache.length = self.length
        return self.step.logits

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        if self.length > cache.capacity:
            cache.reserve(self.length)
            self.step = self._step(self.length)
            if self.speculation is not None:
                self.speculation.moved_to(self.step)
            if self.ahead is not None:
                self.ahead = Ahead(self.step, tokens)
        if self.ahead is not None:
            logits = self.step.logits
            # the last token of all is not decoded any further
            self.choice = self.ahead.next(max(1, min(cache.capacity, self.ids.shape[1] - 1) - self.length + 1))
        elif self.speculation is not None:
            room = min(cache.capacity, self.ids.shape[1] - 1) - self.length
            logits, self.choice = self.speculation.decode(tokens, room)
        else:
            if tokens is not self.step.ids:
                self.step.ids.copy_(tokens)
            self.step.run()
            logits, self.choice = self.step.logits, drawn(self.step.chosen) if self.in_step else self.step.ids
        cache.length = self.length
        return logits

    def _result(self) -> Any:
        ids = self.ids[:, : self.length].to(self.device, copy=True)
        if not self.config.return_dict_in_generate:
            return ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=ids, scores=tuple(self.scores) if self.config.output_scores else None,
            logits=tuple(self.logits) if self.config.output_logits else None, **{CACHE: self.cache},
        )  # fmt: skip
