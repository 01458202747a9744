"""Several models, each as it is, measured against the first of them in the same rounds."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmopt.errors import InputError
from llmopt.measure import ceilings, environment, quality, timing, traffic
from llmopt.measure.comparison import Comparison, ComparisonRow
from llmopt.measure.memory import module_bytes
from llmopt.measure.report import Ceilings, Memory, Quality
from llmopt.model_state import active_passes, is_optimized, state_of
from llmopt.models import resolve_model
from llmopt.models.base import ResolvedModel
from llmopt.models.validate import check_runnable
from llmopt.packed import QuantEmbedding, QuantExperts, QuantLinear
from llmopt.passes.base import Event
from llmopt.passes.quantize_gptq import calibrate

_BUDGET_S = 12.0  # of timing, a model
_QUALITY_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Subject:
    """One model to measure."""

    name: str
    resolved: ResolvedModel
    tokenizer: Any | None
    text: torch.Tensor | None  # [T] the held-out text in its tokens

    @property
    def model(self) -> Any:
        return self.resolved.model

    @property
    def random(self) -> bool:
        return bool(getattr(self.model, "llmopt_random_weights", False))

    @property
    def vocab_size(self) -> int:
        return self.resolved.vocab_size

    @property
    def layers(self) -> tuple[int, int]:
        """How many, and how wide."""
        return len(self.resolved.layers), int(self.model.config.get_text_config().hidden_size)


def measure(
    models: Mapping[str, Any],
    *,
    prompt: Any = None,
    tokenizer: Any = None,
    on_event: Callable[[Event], None] | None = None,
    seed: int = 0,
    plan: timing.Plan | None = None,
) -> Comparison:
    """:func:`llmopt.compare` with a plan of its own.

    Args:
        plan: tokens, rounds and seconds; its prompt length gives way to that of ``prompt``.
    """
    if on_event is not None and not callable(on_event):
        raise InputError.argument("on_event", expected="a function of one Event", got=on_event)
    if tokenizer is not None and not callable(tokenizer):
        raise InputError.argument("tokenizer", expected="a transformers tokenizer or None", got=tokenizer)
    emit = on_event or (lambda event: None)
    subjects = _subjects(models, tokenizer)
    plan = plan or timing.Plan(budget_s=_BUDGET_S * len(subjects))
    ids, source = _prompt(subjects, prompt, plan.prompt_tokens, seed)
    plan = dataclasses.replace(plan, prompt_tokens=ids.shape[1])
    started = time.perf_counter()
    found = _qualities(subjects, emit, seed)
    samples, ceiling = _time(subjects, ids, plan, emit)
    rows = [_row(subject, subjects[0], samples, plan, ceiling) for subject in subjects]
    for row, (figures, notes) in zip(rows, found, strict=True):
        row.quality, row.notes = figures, notes
    machine = environment.capture()
    reason = machine["kernels"]["reason"] if ids.device.type == "cpu" else None
    return Comparison(
        rows=rows, ceilings=ceiling, environment=machine,
        notes=[f"running on PyTorch alone: {reason}"] if reason else [],
        settings={
            "prompt": source, "prompt_tokens": plan.prompt_tokens, "decode_tokens": plan.decode_tokens,
            "rounds": rows[0].timing.decode_ms.rounds, "request_tokens": timing.REQUEST_TOKENS, "seed": seed,
        },
        measured_s=round(time.perf_counter() - started, 1),
    )  # fmt: skip


# ---- which models


def _subjects(models: Any, tokenizer: Any) -> list[_Subject]:
    """The models, checked before anything is run."""
    if not isinstance(models, Mapping) or not models:
        got = models if isinstance(models, Mapping) else type(models).__name__
        raise InputError.argument("models", expected="a mapping of names to one model or more", got=got)
    owners: dict[int, str] = {}
    subjects = []
    for name, model in models.items():
        if not isinstance(name, str):
            raise InputError.argument("models", expected="names that are strings", got=name)
        other = owners.setdefault(id(model), name)
        if other != name:
            raise InputError(f"models: expected another model under each name, got one under {other!r} and {name!r}")
        subjects.append(_subject(name, model, tokenizer))
    devices = {str(s.resolved.device): s.name for s in subjects}
    if len(devices) > 1:
        got = ", ".join(f"{device} ({name})" for device, name in devices.items())
        raise InputError(f"models: expected all on one device, got {got}")
    return subjects


def _subject(name: str, model: Any, tokenizer: Any) -> _Subject:
    try:
        check_runnable(model)
        # a pass may have moved parts that the family declares: what was found before it ran still holds
        resolved = state_of(model).resolved if is_optimized(model) else resolve_model(model)
    except InputError as error:
        raise type(error)(f"models[{name!r}]: {str(error).removeprefix('model: ')}") from error
    tokenizer = calibrate.find_tokenizer(model) if tokenizer is None else tokenizer
    text = _encode(tokenizer, calibrate.packaged_text("quality")) if tokenizer is not None else None
    return _Subject(name, resolved, tokenizer, text)


def _encode(tokenizer: Any, text: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids.to(torch.int64)


# ---- what they read


def _prompt(subjects: list[_Subject], prompt: Any, tokens: int, seed: int) -> tuple[torch.Tensor, str]:
    """The prompt ``[1, T]`` that all models read, and where it is from."""
    vocab = min(s.vocab_size for s in subjects)
    device = subjects[0].resolved.device
    if prompt is not None:
        ids = _given_text(prompt, subjects) if isinstance(prompt, str) else _given_ids(prompt)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise InputError(f"prompt: expected token ids in [0, {vocab}), which all models know, got {low} to {high}")
        return ids[None].to(device), "as given"
    text = _shared(subjects, [s.text for s in subjects])
    if text is not None and len({s.vocab_size for s in subjects}) == 1 and int(text.max()) < vocab:
        return text.repeat(-(-tokens // len(text)))[:tokens][None].to(device), "held-out text"
    ids = torch.randint(0, vocab, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(device), "random token ids"


def _given_text(prompt: str, subjects: list[_Subject]) -> torch.Tensor:
    read = [_encode(s.tokenizer, prompt) if s.tokenizer is not None else None for s in subjects]
    if all(ids is None for ids in read):
        raise InputError(
            "prompt: expected token ids, or tokenizer=: there is no tokenizer.json beside the models' weights; got text"
        )
    ids = _shared(subjects, read)
    if ids is None:
        raise InputError("prompt: expected token ids: the models' tokenizers do not read this text alike; got text")
    if not len(ids):
        raise InputError.argument("prompt", expected="at least one token", got=prompt)
    return ids


def _given_ids(prompt: Any) -> torch.Tensor:
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(prompt).__name__
        raise InputError(f"prompt: expected text or token ids [T] or [1, T], got {got}: {error}") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.numel():
        raise InputError.argument("prompt", expected="text or token ids", got=f"{ids.dtype} {list(ids.shape)}")
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1):
        raise InputError.argument("prompt", expected="token ids [T] or [1, T]", got=list(ids.shape))
    return ids.reshape(-1).to(torch.int64)


def _shared(subjects: list[_Subject], read: list[torch.Tensor | None]) -> torch.Tensor | None:
    """What every tokenizer there is reads, if that is the same."""
    found = [ids for ids in read if ids is not None]
    return found[0] if found and all(torch.equal(ids, found[0]) for ids in found) else None


# ---- quality


def _qualities(
    subjects: list[_Subject], emit: Callable[[Event], None], seed: int
) -> list[tuple[Quality | None, list[str]]]:
    """Each model against the first on the held-out text, and notes; where that would say nothing, the note says why."""
    first, reference = subjects[0], None
    text = next((s.text for s in subjects if s.text is not None and s.vocab_size == first.vocab_size), None)
    found: list[tuple[Quality | None, list[str]]] = []
    for subject in subjects:
        reason = _not_comparable(subject, first, text)
        if reason or text is None:
            found.append((None, [f"quality was not measured: {reason}"]))
            continue
        emit(Event("stage", "compare", f"quality of {subject.name}"))
        # the first is never the one that is not comparable if any other is
        reference = reference or _reference(first, text, seed)
        found.append((quality.compare(subject.resolved, reference), _layers_note(subject, first)))
    return found


def _not_comparable(subject: _Subject, first: _Subject, text: torch.Tensor | None) -> str:
    """Why the logits of two models on the same text cannot be held against each other, or ''."""
    names = list(dict.fromkeys(s.name for s in (subject, first) if s.random))
    if names:
        return f"random weights ({', '.join(names)})"
    if subject.vocab_size != first.vocab_size:
        return f"a vocabulary of {subject.vocab_size}, that of {first.name} has {first.vocab_size}"
    if text is None:
        return "there is no tokenizer.json beside the weights, and none was given"
    if subject.text is not None and not torch.equal(subject.text, text):
        return "its tokenizer reads text differently"
    if int(text.max()) >= subject.vocab_size:
        return f"the tokenizer knows more tokens than the vocabulary of {subject.vocab_size}"
    return ""


def _reference(first: _Subject, text: torch.Tensor, seed: int) -> quality.Reference:
    rows = calibrate.rows(text, first.model, num_rows=_QUALITY_ROWS, seed=seed)
    ids = quality.choose_rows(rows, first.vocab_size)
    return quality.reference(first.resolved, ids.to(first.resolved.device))


def _layers_note(subject: _Subject, first: _Subject) -> list[str]:
    if subject.layers == first.layers:
        return []
    (count, width), (others, other_width) = subject.layers, first.layers
    return [f"not compared layer by layer: {count} layers of {width}, {first.name} has {others} of {other_width}"]


# ---- times


def _time(
    subjects: list[_Subject], ids: torch.Tensor, plan: timing.Plan, emit: Callable[[Event], None]
) -> tuple[dict[str, timing.Samples], Ceilings | None]:
    meter = ceilings.meter_for(ids.device)
    with meter or nullcontext():
        samples = timing.interleaved(
            {s.name: _show(s.model) for s in subjects}, ids, plan,
            every_round=meter.measure_round if meter else None,
            on_round=lambda done, most: emit(Event("progress", "compare", "timing all models", done, most)),
        )  # fmt: skip
        return samples, meter.result() if meter else None


def _show(model: Any) -> Callable[[], Any]:
    return lambda: model


def _row(
    subject: _Subject, first: _Subject, samples: Mapping[str, timing.Samples], plan: timing.Plan,
    ceiling: Ceilings | None,
) -> ComparisonRow:  # fmt: skip
    own, base = samples[subject.name], samples[first.name]
    timed = own.timing(plan.prompt_tokens, plan.decode_tokens)
    read = traffic.decode_bytes(subject.resolved, plan.prompt_tokens, plan.decode_tokens)
    row = ComparisonRow(
        subject.name, _describe(subject), timed, Memory(module_bytes(subject.model)), decode_bytes_per_token=read,
        bandwidth_fraction=traffic.bandwidth_fraction(read, timed, ceiling),
    )  # fmt: skip
    if subject is not first:
        row.gain, row.request = timing.gain(base, own), timing.request_ratio(base, own, timing.REQUEST_TOKENS)
    return row


# ---- what they are


def _describe(subject: _Subject) -> dict[str, Any]:
    model, resolved = subject.model, subject.resolved
    config = model.config
    experts = [getattr(s.parent, s.attr) for layer in resolved.layers if (s := layer.experts) is not None]
    plain_experts = any(not getattr(module, "is_packed", False) for module in experts)
    layers, width = subject.layers
    return {
        "name": str(getattr(config, "_name_or_path", "") or config.model_type),
        "model_type": config.model_type,
        "layers": layers,
        "hidden_size": width,
        "vocab_size": subject.vocab_size,
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "weights": _weights(model),
        "attention": config._attn_implementation,
        "experts": config._experts_implementation if plain_experts else None,
        "passes": list(active_passes(model)),
        "random_weights": subject.random,
    }


def _weights(model: nn.Module) -> str:
    """How the weights are stored, most bytes first: ``int4 g128, int8 g128, bfloat16``."""
    kinds: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        packed = isinstance(module, QuantLinear | QuantEmbedding | QuantExperts)
        for tensor in (*module.parameters(recurse=False), *(module.buffers(recurse=False) if packed else ())):
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            is_codes = tensor.dtype == torch.uint8
            kind = _packed_kind(module) if is_codes else str(tensor.dtype).removeprefix("torch.")
            kinds[kind] += tensor.numel() * tensor.element_size()
    return ", ".join(kind for kind, _ in kinds.most_common())


def _packed_kind(module: Any) -> str:
    group = "per channel" if module.group_size == -1 else f"g{module.group_size}"
    zeros = " asymmetric" if getattr(module, "asymmetric", False) else ""
    # of the packed modules, fused experts alone do not say: they have 4 bits
    return f"int{getattr(module, 'bits', 4)} {group}{zeros}"
