"""The one loop: check -> apply -> verify -> measure -> keep | undo."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from llmopt import native
from llmopt.errors import (
    CalibrationError,
    InputError,
    LlmoptError,
    ModelStateError,
    NativeLibraryError,
    PassError,
)
from llmopt.measure import stats, timing
from llmopt.measure.baseline import Baseline
from llmopt.measure.quality import Reference, choose_rows, reference
from llmopt.measure.quality import compare as compare_quality
from llmopt.measure.report import PassRow, Quality
from llmopt.model_state import State, inherited_by, is_optimized, remember
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


def optimize(
    model: Any,
    passes: Sequence[str | Pass] | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
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
        tokenizer: of the model, a transformers tokenizer, to read that text and the held-out text with. None: the one
            beside the weights, in the directory or the hub's cache that the model was loaded from. Nothing is fetched.
        measure: True; False to apply without measuring (nothing is undone then); "full" adds leave-one-out attribution.
        quality_budget: largest mean KL divergence from the baseline, in nats a token, that a pass may cause.
        strict: a pass that is not kept (it does not apply, fails, or is undone) is an error instead of a row.
        on_event: called with every :class:`~llmopt.passes.base.Event` (progress, verdicts, warnings).
        seed: of everything drawn (calibration fill-up, prompts of random models, bootstrap).

    Returns:
        The same model.

    Raises:
        InputError: the model or an argument cannot be used; nothing has been changed.
        PassError: under ``strict``; the model is as it was given.
    """
    chosen = choose(passes)
    _check_arguments(measure, quality_budget, on_event, tokenizer)
    if is_optimized(model):
        raise ModelStateError("model: already optimized; call llmopt.restore(model) first")
    if (inherited := inherited_by(model)) is not None and inherited.applied:
        names = ", ".join(inherited.applied)
        raise ModelStateError(f"model: {names} applied already, which would be no baseline: {inherited.without()}")
    resolved = validate_model(model)
    run = _Run(resolved, chosen, measure, quality_budget, strict, on_event or (lambda event: None), seed)
    calibrated = run.prepare_rows(calibration, tokenizer)
    _finish(run, calibrated)
    return model


def _check_arguments(measure: object, quality_budget: object, on_event: object, tokenizer: object) -> None:
    # `in (True, False)` would let 0 and 1.0 pass
    if measure is not True and measure is not False and measure != "full":
        raise InputError.argument("measure", expected="True, False or 'full'", got=measure)
    is_number = isinstance(quality_budget, int | float) and not isinstance(quality_budget, bool)
    if quality_budget is not None and not (is_number and quality_budget > 0):  # type: ignore[operator]
        raise InputError.argument("quality_budget", expected="a positive KL divergence in nats", got=quality_budget)
    if on_event is not None and not callable(on_event):
        raise InputError.argument("on_event", expected="a function of one Event", got=on_event)
    if tokenizer is not None and not callable(tokenizer):
        raise InputError.argument("tokenizer", expected="a transformers tokenizer or None", got=tokenizer)


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
    row = PassRow(item.name, "kept", "built directly in int4 from random codes", item.options())
    row.coverage, row.details = dataclasses.asdict(applied.coverage), applied.details
    run.rows.append(row)
    _finish(run, False)
    return model


def _finish(run: _Run, calibrated: bool) -> None:
    try:
        remember(run.resolved.model, run.run(calibrated))
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
        self.budget, self._on_event = budget, on_event
        self._callback_error: BaseException | None = None
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

    def emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except BaseException as error:
            # the caller's own error is not a pass's failure: it goes back to the caller
            self._callback_error = error
            raise

    # ---- data

    def prepare_rows(self, calibration: Any, tokenizer: Any = None) -> bool:
        """Make calibration and held-out rows before any work, so that bad data costs nothing."""
        model, needs = self.resolved.model, any(p.needs_calibration for p in self.passes)
        if self.random:
            self.notes.append("random weights: no quality figures")
        if self.random and calibration is None:
            rows = _random_rows(self.resolved, self.seed)
            self.calibration, self.held_out = rows[:-2], rows[-2:]
            self.notes.append("calibrated on random token ids")
            return needs
        if needs or calibration is not None:
            self.calibration = calibrate.rows(calibration, model, tokenizer=tokenizer, seed=self.seed)
        if self.measure is False:
            return needs
        reader = calibrate.find_tokenizer(model) if tokenizer is None else tokenizer
        if reader is not None:
            text = calibrate.packaged_text("quality")
            self.held_out = calibrate.rows(text, model, tokenizer=reader, num_rows=32, seed=self.seed)
        elif len(self.calibration) > 1:
            cut = max(1, len(self.calibration) // 8)
            self.held_out, self.calibration = self.calibration[-cut:], self.calibration[:-cut]
            self.notes.append("no tokenizer beside the weights: quality is measured on calibration rows held out")
        else:
            raise CalibrationError(
                "calibration: measuring quality needs text the model can read, and there is no tokenizer.json in "
                f"'{getattr(model.config, '_name_or_path', '')}'; pass tokenizer=, calibration= token ids (two rows or "
                "more), or measure=False"
            )
        return needs

    def prompt(self, tokens: int) -> torch.Tensor:
        stream = torch.cat([*self.held_out, *self.calibration])
        return stream.repeat(-(-tokens // len(stream)))[:tokens][None]

    # ---- the loop

    def run(self, calibrated: bool) -> State:
        started = time.perf_counter()
        if self.resolved.device.type == "cpu" and not native.available():
            self.notes.append(_say_no_kernels())
        for rows in (self.calibration, self.held_out):
            rows[:] = [row.to(self.resolved.device) for row in rows]
        receipt = Receipt(self.resolved, self.stages, self.emit, self.random, self.baseline)
        ctx = PassContext(
            self.resolved, self.resolved.device, self.emit, calibration=self.calibration,
            seed=self.seed, prompt_tokens=receipt.plan.prompt_tokens, timed=bool(self.measure),
        )  # fmt: skip
        if self.measure:
            self.emit(Event("stage", "baseline", "recording the eager baseline"))
            began = time.perf_counter()
            ids = choose_rows(self.held_out, self.resolved.vocab_size)
            self.stages.show((), EAGER)
            self.quality_ref = reference(self.resolved, ids)
            self.last_quality = compare_quality(self.resolved, self.quality_ref)
            receipt.baseline_quality = None if self.random else self.last_quality
            receipt.measured_s += time.perf_counter() - began
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
        return State(self.resolved, self.stages, self.kept, originals, report)

    def _patches(self) -> list[Patch]:
        return [applied.patch for _, applied in self.kept]

    def _one_pass(self, item: Pass, ctx: PassContext, receipt: Receipt) -> PassRow:
        self.emit(Event("stage", item.name, "checking"))
        # timing may have left another stage behind: a pass looks at the model as the kept ones have made it
        self.stages.show(self._patches())
        options = item.options()
        verdict = item.check(ctx)
        if not verdict.applies:
            return self._not_kept(PassRow(item.name, "not applicable", verdict.reason, options))
        row = PassRow(item.name, "kept", "", options)
        try:
            applied = self._apply(item, ctx, row)
            if self.measure:
                self._judge(row, item, applied, receipt)
        except (LlmoptError, RuntimeError, ArithmeticError, ValueError, MemoryError) as error:
            self.stages.show(self._patches())
            if isinstance(error, InputError) or error is self._callback_error:
                raise
            failed = PassRow(item.name, "undone", f"failed, model rolled back: {error}", options)
            return self._not_kept(failed, cause=error)
        if row.verdict == "kept":
            self.kept.append((item, applied))
            self.emit(Event("verdict", item.name, f"kept: {row.reason}"))
            return row
        self.stages.show(self._patches())
        return self._not_kept(row)

    def _apply(self, item: Pass, ctx: PassContext, row: PassRow) -> Applied:
        started = time.perf_counter()
        applied = item.apply(ctx)
        row.apply_s = time.perf_counter() - started
        self.stages.show([*self._patches(), applied.patch])
        row.coverage, row.details = dataclasses.asdict(applied.coverage), applied.details
        return applied

    def _not_kept(self, row: PassRow, cause: BaseException | None = None) -> PassRow:
        if self.strict:
            raise PassError(f"{row.name}: {row.verdict}: {row.reason}") from cause
        if cause is not None:
            _LOG.warning("%s: %s", row.name, row.reason)
        self.emit(Event("verdict", row.name, f"{row.verdict}: {row.reason}"))
        return row

    # ---- verdicts

    def _judge(self, row: PassRow, item: Pass, applied: Applied, receipt: Receipt) -> None:
        """Verify outputs, then time against the stage before; fills the row and decides."""
        assert self.quality_ref is not None
        assert self.last_quality is not None
        self.emit(Event("stage", row.name, "verifying against the baseline's logits"))
        began = time.perf_counter()
        quality = compare_quality(self.resolved, self.quality_ref)
        receipt.measured_s += time.perf_counter() - began
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
        tokens = receipt.plan.prompt_tokens, receipt.request_tokens
        row.verdict, row.reason = judge_speed(whole, *tokens, must_gain=item.must_gain)
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
                return f"outputs changed: mean KL {quality.mean_kl:.3g} nats against {self.last_quality.mean_kl:.3g} before"
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


def judge_speed(
    whole: Any, prompt_tokens: int, decode_tokens: int, *, must_gain: bool = False
) -> tuple[Literal["kept", "undone"], str]:  # fmt: skip
    """Verdict from the ratio old / new of whole requests: undone when slower beyond noise and margin, or without a gain."""
    figures = f"{whole.value:.2f}x [{whole.low:.2f}, {whole.high:.2f}]"
    request = f"a request of {prompt_tokens} + {decode_tokens} tokens"
    if whole.high < 1 and whole.value < 1 - MARGIN:
        return "undone", f"slower: {request} runs at {figures} of the stage before"
    if whole.low > 1 and whole.value > 1 + MARGIN:
        return "kept", f"faster: {request} runs at {figures}"
    return "undone" if must_gain else "kept", f"no difference beyond noise: {figures}"


@functools.cache
def _say_no_kernels() -> str:
    """Warns once a process; the receipt always says it."""
    try:
        native.library()
    except NativeLibraryError as error:
        message = f"running on PyTorch alone: {error}"
        warnings.warn(f"llmopt: {message}", stacklevel=5)
        return message
    raise AssertionError("called although the kernels can be loaded")


def _break_even(apply_s: float, before: timing.Samples, after: timing.Samples) -> float | None:
    saved_ms = stats.interval(before.decode_ms).value - stats.interval(after.decode_ms).value
    return apply_s * 1e3 / saved_ms if saved_ms > 0 else None


def _random_rows(resolved: ResolvedModel, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, resolved.vocab_size, (10, calibrate.ROW_TOKENS), generator=generator))
