"""Receipts for published shapes with random weights, whatever their size."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from llmopt import loop, verbs
from llmopt.errors import InputError
from llmopt.measure.baseline import ScaledBaseline
from llmopt.measure.memory import available_bytes
from llmopt.measure.report import Report
from llmopt.models import shapes
from llmopt.passes import CompileTvm, choose
from llmopt.passes.base import Event, Pass
from llmopt.passes.quantize_gptq import QuantizeGptq
from llmopt.passes.quantize_gptq.direct import build_quantized

# what optimizing takes besides the bf16 weights: the int4 copy, one block's Hessians, logits, the bandwidth buffer
_WORKING_SHARE, _WORKING_BYTES = 1.35, 3 << 30
# of what is left after the int4 model, for the bf16 layers of a scaled baseline
_BASELINE_SHARE = 0.75
_MOST_BASELINE_LAYERS = 8


def bench_shape(
    name: str,
    passes: Sequence[str | Pass] | None = None,
    *,
    measure: Any = True,
    num_layers: int | None = None,
    on_event: Callable[[Event], None] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Report:
    """Build a published shape with random weights, optimize it and return the receipt.

    Where the bf16 model fits, this is :func:`llmopt.optimize` on it. Where it does not, the model is built directly in
    int4, and the eager baseline is timed on as many bf16 layers as fit and scaled by layers; the receipt says so.

    Args:
        name: of the shape.
        passes: as for :func:`llmopt.optimize`; None for all, compile_tvm with its rival timed beside it.
        measure: as for :func:`llmopt.optimize`, as are ``on_event``, ``seed`` and ``settings``.
        num_layers: only the first layers.

    Raises:
        InputError: unknown shape; or it does not fit, and the passes do not begin with quantize_gptq or something is asked
            for that random codes do not have.
    """
    chosen = with_rivals(passes)
    config = shapes.config_for(name)
    if fits(name, num_layers):
        model = shapes.build(name, num_layers=num_layers, seed=seed)
        loop.optimize(model, chosen, measure=measure, on_event=on_event, seed=seed, **settings)
        report = verbs.report(model)
        report.model["name"] = name
        return report
    if not chosen or not isinstance(chosen[0], QuantizeGptq):
        raise InputError(
            f"shape: {name} does not fit into memory in bfloat16; it can be measured with quantize_gptq among the passes, "
            "or with num_layers= for its first layers only"
        )
    options = chosen[0]
    _check_direct(name, options, num_layers, settings)
    assert options.head_bits is not None
    model, applied = build_quantized(name, group_size=options.group_size, head_bits=options.head_bits, seed=seed)
    layers, fewer = _depths(config)
    baseline = ScaledBaseline(name, layers=layers, fewer=fewer, total=config.num_hidden_layers, seed=seed)
    loop.optimize_built(
        model, (options, applied), chosen[1:], baseline=baseline, measure=measure, on_event=on_event, seed=seed
    )
    report = verbs.report(model)
    report.model["name"] = name
    del model
    gc.collect()
    return report


def _check_direct(name: str, options: QuantizeGptq, num_layers: int | None, settings: dict[str, Any]) -> None:
    """What is asked for and cannot be had of a model that is built from random codes is an error, never left out."""
    asked = {
        "num_layers": num_layers is not None,
        "sym=False": not options.sym,
        "skip": bool(options.skip),
        "head_bits=None": options.head_bits is None,
        # by identity: calibration may be a tensor
        **{key: value is not None and value is not False for key, value in settings.items()},
    }
    if named := [key for key, wanted in asked.items() if wanted]:
        raise InputError(
            f"shape: {name} does not fit into memory in bfloat16, and built in int4 from random codes it has no "
            f"{', '.join(named)}"
        )


def with_rivals(passes: Sequence[str | Pass] | None) -> list[Pass]:
    """The passes chosen; where the choice is left open, compile_tvm with its rival timed beside it."""
    chosen = choose(passes)
    if passes is not None:
        return chosen
    return [CompileTvm(backend="auto") if isinstance(item, CompileTvm) else item for item in chosen]


def fits(name: str, num_layers: int | None = None) -> bool:
    """The shape can be built in bf16 and optimized in the memory this process can take."""
    config = shapes.config_for(name)
    needed = shapes.parameter_bytes(config)
    if num_layers is not None:
        skipped = shapes.layer_bytes(config)[num_layers:]
        needed -= sum(skipped)
    available = available_bytes()
    return available is None or needed * _WORKING_SHARE + _WORKING_BYTES < available


def _depths(config: Any) -> tuple[int, int]:
    """Layers for the scaled baseline: as many as fit, and few; both hold all leading layers of another kind."""
    sizes = shapes.layer_bytes(config)
    leading = next(i for i in range(len(sizes)) if sizes[i] == sizes[-1])
    rest = shapes.parameter_bytes(config) - sum(sizes)
    available = available_bytes()
    room = _BASELINE_SHARE * available - rest - sum(sizes[:leading]) if available is not None else sum(sizes)
    most = min(leading + int(room / sizes[-1]), leading + _MOST_BASELINE_LAYERS, len(sizes))
    if most < leading + 2:
        raise InputError(
            f"shape: not even {leading + 2} of its layers fit into memory in bfloat16 beside the int4 model"
        )
    return most, leading + 1
