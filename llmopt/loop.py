"""The one loop: check -> apply -> verify -> measure -> keep | undo, and the functions around it."""

from __future__ import annotations

import dataclasses
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from llmopt.errors import CalibrationError, InputError, LlmoptError, ModelStateError, PassError
from llmopt.measure import stats, timing
from llmopt.measure.baseline import Baseline
from llmopt.measure.quality import Reference, choose_rows, compare as compare_quality, reference
from llmopt.measure.report import PassRow, Quality, Report
from llmopt.models import resolve_model
from llmopt.models.base import ResolvedModel
from llmopt.models.validate import validate_model
from llmopt.originals import Originals
from llmopt.passes import choose
from llmopt.passes.base import Applied, Event, Pass, PassContext, Patch
from llmopt.passes.quantize_gptq import calibrate
from llmopt.receipt import Receipt
from llmopt.stages import EAGER, Stages

_LOG = logging.getLogger("llmopt")
MeasureLevel = Literal[True, False, "full"]

# a change of less than this share is no difference, however narrow the interval
MARGIN = 0.01


@dataclasses.dataclass(slots=True)
class _State:
    """What llmopt knows of an optimized model."""

    resolved: ResolvedModel
    stages: Stages
    kept: list[tuple[Pass, Applied]]
    originals: Originals
    report: Report


_STATES: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()


def optimize(
    model: Any,
    passes: Sequence[str | Pass] | None = None,
    *,
    calibration: Any = None,
    measure: MeasureLevel = True,
    quality_budget: float | None = None,
    strict: bool = False,
    on_event: Callable[[Event], None] | None = None,
    seed: int = 0,
) -> Any:
    """Optimize a causal LM in place, and measure what each pass gained.

    Every pass is checked, applied, verified against the eager baseline's logits, timed against the stage before in
    interleaved rounds, and kept or undone. The receipt is :func:`report`; :func:`restore` gives the model back bit by bit.

    Args:
        model: a Hugging Face causal LM of a supported family, in eval mode.
        passes: names or Pass objects; None for all. They run in the order of their phases.
        calibration: text, token ids, or an iterable of either, for passes that need it; None for the packaged text.
        measure: True; False to apply without measuring (nothing is undone then); "full" adds leave-one-out attribution.
        quality_budget: largest mean KL divergence from the baseline, in nats a token, that a pass may cause.
        strict: a pass that does not apply, or fails, is an error instead of a row in the receipt.
        on_event: called with every :class:`~llmopt.passes.base.Event` (progress, verdicts, warnings).
        seed: of everything drawn (calibration fill-up, prompts of random models, bootstrap).

    Returns:
        The same model.

    Raises:
        InputError: the model or an argument cannot be used; nothing has been changed.
        PassError: under ``strict``; the model is as it was given.
    """
    chosen = choose(passes)
    if measure not in (True, False, "full"):
        raise InputError.argument("measure", expected="True, False or 'full'", got=measure)
    if quality_budget is not None and not quality_budget > 0:
        raise InputError.argument("quality_budget", expected="a positive KL divergence in nats", got=quality_budget)
    if model in _STATES:
        raise ModelStateError("model: already optimized; call llmopt.restore(model) first")
    resolved = validate_model(model)
    run = _Run(resolved, chosen, measure, quality_budget, strict, on_event or (lambda event: None), seed)
    calibrated = run.prepare_rows(calibration)
    _finish(run, calibrated)
    return model


def optimize_built(
    model: Any, built: tuple[Pass, Applied], passes: list[Pass], *, baseline: Baseline, measure: MeasureLevel = True,
    on_event: Callable[[Event], None] | None = None, seed: int = 0,
) -> Any:  # fmt: skip
    """:func:`optimize` for a model that was built quantized: ``built`` is a pass that cannot be switched off.

    Its baseline comes from elsewhere (:class:`llmopt.measure.baseline.ScaledBaseline`). For benchmarks of shapes whose
    unquantized weights do not fit into memory.
    """
    item, applied = built
    run = _Run(resolve_model(model), passes, measure, None, False, on_event or (lambda event: None), seed)
    run.baseline, run.kept = baseline, [built]
    run.prepare_rows(None)
    run.notes.append(baseline.note)
    row = PassRow(item.name, "kept", "built directly in int4 from random codes", dataclasses.asdict(item))
    row.coverage = dataclasses.asdict(applied.coverage)
    run.rows.append(row)
    _finish(run, False)
    return model


def _finish(run: _Run, calibrated: bool) -> None:
    try:
        _STATES[run.resolved.model] = run.run(calibrated)
    except BaseException:
        run.stages.as_given()
        raise


class _Run:
    """One call of :func:`optimize`."""

    def __init__(
        self, resolved: ResolvedModel, passes: list[Pass], measure: MeasureLevel, budget: float | None, strict: bool,
        on_event: Callable[[Event], None], seed: int,
    ) -> None:  # fmt: skip
        self.resolved, self.passes, self.measure, self.strict, self.seed = resolved, passes, measure, strict, seed
        self.budget, self.emit = budget, on_event
        self.stages = Stages(resolved.model)
        self.kept: list[tuple[Pass, Applied]] = []
        self.quality_ref: Reference | None = None
        self.last_quality: Quality | None = None
        self.random = bool(getattr(resolved.model, "llmopt_random_weights", False))
        self.calibration: list[torch.Tensor] = []
        self.held_out: list[torch.Tensor] = []
        self.notes: list[str] = []
        self.rows: list[PassRow] = []
        self.baseline: Baseline | None = None

    # ---- data

    def prepare_rows(self, calibration: Any) -> bool:
        """Make calibration and held-out rows before any work, so that bad data costs nothing."""
        model, needs = self.resolved.model, any(p.needs_calibration for p in self.passes)
        if self.random and calibration is None:
            rows = _random_rows(self.resolved, self.seed)
            self.calibration, self.held_out = rows[:-2], rows[-2:]
            self.notes.append("random weights: no quality figures; calibrated on random token ids")
            return needs
        if needs or calibration is not None:
            self.calibration = calibrate.rows(calibration, model, seed=self.seed)
        if self.measure is False:
            return needs
        if calibrate.find_tokenizer(model) is not None:
            self.held_out = calibrate.rows(calibrate.packaged_text("quality"), model, num_rows=32, seed=self.seed)
        elif len(self.calibration) > 1:
            cut = max(1, len(self.calibration) // 8)
            self.held_out, self.calibration = self.calibration[-cut:], self.calibration[:-cut]
            self.notes.append("no tokenizer beside the weights: quality is measured on calibration rows held out")
        else:
            raise CalibrationError(
                "calibration: measuring quality needs text the model can read, and there is no tokenizer.json in "
                f"'{getattr(model.config, '_name_or_path', '')}'; pass calibration= token ids (two rows or more), "
                "or measure=False"
            )
        return needs

    def prompt(self, tokens: int) -> torch.Tensor:
        stream = torch.cat([*self.held_out, *self.calibration])
        return stream.repeat(-(-tokens // len(stream)))[:tokens][None]

    # ---- the loop

    def run(self, calibrated: bool) -> _State:
        started = time.perf_counter()
        receipt = Receipt(self.resolved, self.stages, self.emit, self.random, self.baseline)
        ctx = PassContext(
            self.resolved, self.resolved.device, self.emit, calibration=self.calibration,
            seed=self.seed, prompt_tokens=receipt.plan.prompt_tokens,
        )  # fmt: skip
        if self.measure:
            self.emit(Event("stage", "baseline", "recording the eager baseline"))
            ids = choose_rows(self.held_out, int(self.resolved.model.config.vocab_size))
            self.stages.show((), EAGER)
            self.quality_ref = reference(self.resolved, ids)
            self.last_quality = compare_quality(self.resolved, self.quality_ref)
            receipt.baseline_quality = None if self.random else self.last_quality
        self.stages.show(self._patches())
        for item in self.passes:
            self.rows.append(self._one_pass(item, ctx, receipt))
        if self.measure:
            receipt.measure_ladder(self.prompt, self.rows, self.kept, full=self.measure == "full")
        self.stages.show(self._patches())
        originals = Originals(self.resolved.model, self._patches())
        if originals.num_bytes:
            self.notes.append(originals.spill())
        report = receipt.report(self.rows, self.notes, self._settings(calibrated), time.perf_counter() - started)
        return _State(self.resolved, self.stages, self.kept, originals, report)

    def _patches(self) -> list[Patch]:
        return [applied.patch for _, applied in self.kept]

    def _one_pass(self, item: Pass, ctx: PassContext, receipt: Receipt) -> PassRow:
        self.emit(Event("stage", item.name, "checking"))
        options = {k: v for k, v in dataclasses.asdict(item).items()} if dataclasses.is_dataclass(item) else {}
        verdict = item.check(ctx)
        if not verdict.applies:
            return self._not_kept(PassRow(item.name, "not applicable", verdict.reason, options))
        started = time.perf_counter()
        try:
            applied = item.apply(ctx)
            seconds = time.perf_counter() - started
            self.stages.show([*self._patches(), applied.patch])
        except (InputError, KeyboardInterrupt):
            raise
        except (LlmoptError, RuntimeError, ArithmeticError, ValueError, MemoryError) as error:
            self.stages.show(self._patches())
            row = PassRow(item.name, "undone", f"failed, model rolled back: {error}", options)
            return self._not_kept(row, cause=error)
        row = PassRow(item.name, "kept", "", options, apply_s=seconds)
        row.coverage, row.details = dataclasses.asdict(applied.coverage), applied.details
        if self.measure:
            self._judge(row, applied, receipt)
        if row.verdict == "kept":
            self.kept.append((item, applied))
            self.emit(Event("verdict", item.name, f"kept: {row.reason}"))
            return row
        self.stages.show(self._patches())
        return self._not_kept(row)

    def _not_kept(self, row: PassRow, cause: BaseException | None = None) -> PassRow:
        if self.strict:
            raise PassError(f"{row.name}: {row.verdict}: {row.reason}") from cause
        if cause is not None:
            _LOG.warning("%s: %s", row.name, row.reason)
        self.emit(Event("verdict", row.name, f"{row.verdict}: {row.reason}"))
        return row

    # ---- verdicts

    def _judge(self, row: PassRow, applied: Applied, receipt: Receipt) -> None:
        """Verify outputs, then time against the stage before; fills the row and decides."""
        assert self.quality_ref is not None and self.last_quality is not None
        self.emit(Event("stage", row.name, "verifying against the baseline's logits"))
        quality = compare_quality(self.resolved, self.quality_ref)
        row.quality = None if self.random else quality
        row.memory = receipt.memory()
        row.reason = self._outputs_wrong(quality, applied)
        if row.reason:
            row.verdict = "undone"
            return
        before, after = receipt.time_pair(self.prompt, row.name, self._patches(), [*self._patches(), applied.patch])
        row.marginal = timing.gain(before, after)
        row.timing = after.timing(receipt.plan.prompt_tokens, receipt.plan.decode_tokens)
        whole = timing.request_ratio(before, after, receipt.request_tokens)
        row.details["request_ratio"] = dataclasses.asdict(whole)
        row.break_even_tokens = _break_even(row.apply_s, before, after)
        row.verdict, row.reason = judge_speed(whole, receipt.plan.prompt_tokens, receipt.request_tokens)
        if row.verdict == "kept":
            self.last_quality = quality

    def _outputs_wrong(self, quality: Quality, applied: Applied) -> str:
        """Why the outputs disqualify the pass, or ''."""
        assert self.last_quality is not None
        if quality.non_finite or quality.mean_kl != quality.mean_kl:
            where = ", ".join(quality.non_finite[:3]) or "the logits"
            return f"outputs hold NaN or Inf in {where}"
        if not applied.changes_numerics:
            # an exact pass may move the last bits, no more
            slack = 1e-5 if self.resolved.dtype == torch.float32 else 5e-3
            if quality.mean_kl > 1.25 * self.last_quality.mean_kl + slack:
                return (
                    f"outputs changed: mean KL {quality.mean_kl:.3g} nats against {self.last_quality.mean_kl:.3g} before"
                )
        if self.budget is not None and not self.random and quality.mean_kl > self.budget:
            return f"outside the quality budget: mean KL {quality.mean_kl:.3g} nats, allowed {self.budget:.3g}"
        return ""

    def _settings(self, calibrated: bool) -> dict[str, Any]:
        return {
            "passes": [p.name for p in self.passes],
            "measure": self.measure,
            "quality_budget": self.budget,
            "strict": self.strict,
            "seed": self.seed,
            "calibration_tokens": sum(len(r) for r in self.calibration) if calibrated else 0,
            "given_implementations": list(self.stages.given),
        }


def judge_speed(whole: Any, prompt_tokens: int, decode_tokens: int) -> tuple[Literal["kept", "undone"], str]:
    """Verdict from the ratio old / new of whole requests: undone only when slower beyond noise and margin."""
    figures = f"{whole.value:.2f}x [{whole.low:.2f}, {whole.high:.2f}]"
    request = f"a request of {prompt_tokens} + {decode_tokens} tokens"
    if whole.high < 1 and whole.value < 1 - MARGIN:
        return "undone", f"slower: {request} runs at {figures} of the stage before"
    if whole.low > 1 and whole.value > 1 + MARGIN:
        return "kept", f"faster: {request} runs at {figures}"
    return "kept", f"no difference beyond noise: {figures}"


def _break_even(apply_s: float, before: timing.Samples, after: timing.Samples) -> float | None:
    saved_ms = stats.interval(before.decode_ms).value - stats.interval(after.decode_ms).value
    return apply_s * 1e3 / saved_ms if saved_ms > 0 else None


def _random_rows(resolved: ResolvedModel, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vocab = int(resolved.model.config.vocab_size)
    return list(torch.randint(0, vocab, (10, calibrate.ROW_TOKENS), generator=generator))


# ---- around the loop


def _state(model: Any) -> _State:
    if model not in _STATES:
        raise InputError("model: not optimized by llmopt in this process (or restored since)")
    return _STATES[model]


def report(model: Any) -> Report:
    """The receipt of an optimized model."""
    return _state(model).report


def restore(model: Any) -> Any:
    """Undo every pass. The model is bit for bit what it was before :func:`optimize`; returns it.

    Raises:
        InputError: the model is not optimized, or was loaded quantized (there is nothing to go back to).
    """
    state = _state(model)
    state.originals.bring_back()
    state.stages.as_given()
    del _STATES[model]
    return model


def save(model: Any, directory: str | Path, *, tokenizer: Any = None) -> Path:
    """Write an optimized (or plain) model as a standard checkpoint, with llmopt.json beside it.

    Args:
        model: optimized, loaded by :func:`load`, or a plain supported model.
        directory: made, or replaced if it holds a checkpoint; an existing one survives any failure.
        tokenizer: saved along; None takes the one beside the original weights, if any.
    """
    from llmopt import checkpoint

    if model not in _STATES:
        return checkpoint.save(model, directory, tokenizer=tokenizer)
    state = _STATES[model]
    originals = {}
    family = state.resolved.family
    for path, module in ((family.embedding, state.resolved.embedding), (family.head, state.resolved.head.module)):
        # a model loaded quantized has no originals; the writer then stores what the packed bytes stand for
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            originals[f"{path}.weight"] = state.originals.tensor(module.weight)
    applied = {p.name: dataclasses.asdict(p) for p, _ in state.kept if dataclasses.is_dataclass(p)}
    return checkpoint.save(
        model, directory, tokenizer=tokenizer, originals=originals, passes=applied, report=state.report
    )


def load(directory: str | Path, *, passes: Sequence[str | Pass] | Literal["saved"] | None = "saved") -> Any:
    """Read a checkpoint: ours, GPTQ ones by AutoGPTQ or GPTQModel, or a plain one. Local files only.

    Args:
        directory: holds config.json and safetensors.
        passes: "saved" applies again, unmeasured, what llmopt.json records (int4 weights are in the file already);
            a sequence applies those; None applies nothing.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    from llmopt import checkpoint

    model = checkpoint.load(directory)
    recorded = checkpoint.recorded_passes(directory) if passes == "saved" else passes
    again = [p for p in choose_recorded(recorded) if not p.needs_calibration]
    if again:
        _apply_unmeasured(model, again)
    return model


def choose_recorded(recorded: Any) -> list[Pass]:
    """Passes from names, objects, or the ``{name: options}`` of llmopt.json."""
    from llmopt.passes import PASSES

    if not isinstance(recorded, Mapping):
        return choose(recorded or ())
    unknown = [name for name in recorded if name not in PASSES]
    if unknown:
        raise InputError(f"llmopt.json: expected passes among {', '.join(PASSES)}, got {unknown[0]!r}")
    return choose([PASSES[n](**{k: tuple(v) if isinstance(v, list) else v for k, v in o.items()})
                   for n, o in recorded.items()])  # fmt: skip


def _apply_unmeasured(model: Any, passes: list[Pass]) -> None:
    resolved = resolve_model(model)
    ctx = PassContext(resolved, next(model.buffers()).device, lambda event: None)
    for item in passes:
        verdict = item.check(ctx)
        if not verdict.applies:
            _LOG.warning("%s: not applied again: %s", item.name, verdict.reason)
            continue
        item.apply(ctx).patch.enable()


def compare(models: Mapping[str, Any], **settings: Any) -> list[Report]:
    """Receipts of several models, for a table side by side (:func:`llmopt.measure.views.print_compare`).

    Args:
        models: name -> model. Optimized ones give the receipt they have; others are optimized first, with ``settings``
            as for :func:`optimize`.
    """
    if not models:
        raise InputError.argument("models", expected="at least one model", got=models)
    reports = []
    for name, model in models.items():
        if model not in _STATES:
            optimize(model, **settings)
        receipt = report(model)
        receipt.model["name"] = name
        reports.append(receipt)
    return reports

