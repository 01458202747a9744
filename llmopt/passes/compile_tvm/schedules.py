"""Schedules of generated kernels: the one every kernel gets, those that tuning draws, and those that are on record.

They are MetaSchedule's (TVM), whose rules are applied here one by one: its own search loop copies functions by way of JSON,
and its contexts import the tensor intrinsics of every device, for half a minute.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm.s_tir import Schedule, renew_defs
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import Trace

from llmopt.errors import LlmoptError

_VECTORS, _UNROLLED = (8, 16, 32, 64), (0, 16, 64)
_FUNCTION = "main"
# What the rules below write, and all that a schedule from elsewhere may hold: other instructions change what is computed, or
# take guards away (Split can), and a pragma may carry C. By instruction, the attributes it may have.
_PLAIN = ("GetChildBlocks", "GetLoops", "ComputeInline", "SampleComputeLocation", "DecomposeReduction", "Vectorize")
_ANNOTATIONS = {
    "meta_schedule.vectorize": _VECTORS, "meta_schedule.unroll_explicit": _UNROLLED,
    "pragma_auto_unroll_max_step": _UNROLLED, "pragma_unroll_explicit": (0, 1),
}  # fmt: skip
_ATTRIBUTES: dict[str, Callable[[list[Any]], bool]] = {
    **dict.fromkeys(_PLAIN, lambda given: given == []),
    "GetSBlock": lambda given: len(given) == 2 and type(given[0]) is str and given[1] == _FUNCTION,
    "ComputeAt": lambda given: len(given) == 2 and all(type(x) is int for x in given),
    "Fuse": lambda given: len(given) == 1 and given[0] in (0, 1),
    "SampleCategorical": lambda given: given[0] == list(_UNROLLED) and all(type(x) is float for x in given[1]),
    "Annotate": lambda given: len(given) == 1 and given[0] in _ANNOTATIONS,
    "Unannotate": lambda given: len(given) == 1 and given[0] in _ANNOTATIONS,
}
_VARIABLE = re.compile(r"[a-z]\d{1,4}|_")


class RefusedScheduleError(LlmoptError):
    """A schedule on record does not fit its kernel, or holds what no schedule of ours does."""


def name_of(kernel: Any) -> str:
    """What a kernel (a PrimFunc) computes, as 16 hex digits: alike for equal code, whatever its variables are called."""
    return f"{tvm_ffi.structural_hash(kernel) & (2**64 - 1):016x}"


def default(kernel: Any) -> Schedule:
    """Every elementwise stage inside the stage that reads it: no kernel writes what only it reads."""
    schedule = _of(kernel)
    _everywhere(_inline(), schedule)
    return schedule


def drawn(kernel: Any, seed: int) -> Schedule:
    """One of many: where the other stages are computed, and how far loops are unrolled.

    Args:
        kernel: a PrimFunc; sizes may be symbolic.
        seed: 1 or more.
    """
    schedule = _of(kernel, seed=seed)
    rule = ms.schedule_rule
    # on one thread: the step shares its work itself
    unroll = rule.ParallelizeVectorizeUnroll(
        max_jobs_per_core=-1, max_vectorize_extent=_VECTORS[seed % len(_VECTORS)], unroll_max_steps=list(_UNROLLED),
        unroll_explicit=True,
    )  # fmt: skip
    for each in (_inline(), rule.RandomComputeLocation(), unroll):
        schedule = _everywhere(each, schedule)
    for change in (ms.postproc.RewriteParallelVectorizeUnroll(), ms.postproc.RewriteReductionBlock()):
        if not change.apply(schedule):
            raise RefusedScheduleError(f"{type(change).__name__} refuses the schedule of seed {seed}")
    return schedule


def said(schedule: Schedule) -> list[Any]:
    """A schedule as JSON has it: its instructions and what was drawn."""
    return _plain(schedule.trace.as_json())  # type: ignore[no-any-return]


def replayed(kernel: Any, trace: Any) -> Schedule:
    """The schedule that :func:`said` wrote.

    Raises:
        RefusedScheduleError: it was written for another kernel, or says more than a schedule may.
    """
    _check(trace)
    schedule = _of(kernel)
    try:
        Trace.apply_json_to_schedule(trace, schedule)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise RefusedScheduleError(f"it is no schedule of this kernel ({type(error).__name__})") from None
    return schedule


def function(schedule: Schedule) -> Any:
    """The scheduled PrimFunc."""
    return schedule.mod[_FUNCTION]


def _of(kernel: Any, **options: int) -> Schedule:
    # a copy: TVM's changes reach into the function they were given where nothing else holds a part of it
    return Schedule(renew_defs(kernel), **options)


def _inline() -> Any:
    return ms.schedule_rule.AutoInline(
        into_producer=False, into_consumer=True, inline_const_tensor=True, disallow_if_then_else=False,
        require_injective=True, require_ordered=False,
    )  # fmt: skip


def _everywhere(rule: Any, schedule: Schedule) -> Schedule:
    root = schedule.get_sblock("root")
    for block in [*schedule.get_child_blocks(root), root]:
        (schedule,) = rule.apply(schedule, block)
    return schedule


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, int | float):
        return value
    return value.value if hasattr(value, "value") else [_plain(inner) for inner in value]


def _check(trace: Any) -> None:
    try:
        instructions, decisions = trace
        for kind, inputs, attributes, outputs in instructions:
            known = kind in _ATTRIBUTES and _ATTRIBUTES[kind](attributes)
            if not known or not _are_variables(outputs) or not _are_inputs(kind, inputs, attributes):
                raise RefusedScheduleError(f"it holds {kind!r} in a form that no schedule of ours has")
        for index, decision in decisions:
            if type(index) is not int or type(decision) is not int:
                raise RefusedScheduleError("it is not a schedule: a decision is no number")
    except (TypeError, ValueError, LookupError):
        raise RefusedScheduleError("it is not a schedule") from None


def _are_inputs(kind: str, inputs: list[Any], attributes: list[Any]) -> bool:
    if kind != "Annotate":
        return _are_variables(inputs)
    what, value = inputs
    return _are_variables([what]) and (_are_variables([value]) or value in _ANNOTATIONS[attributes[0]])


def _are_variables(names: list[Any]) -> bool:
    return all(type(name) is str and _VARIABLE.fullmatch(name) is not None for name in names)
