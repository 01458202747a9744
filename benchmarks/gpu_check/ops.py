"""Ops beside their references, case by case: on a GPU in several processes, for compiling is what takes the time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from multiprocessing import TimeoutError as NoAnswerError
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from benchmarks.gpu_check.run import Run, WrongAnswerError, failures

# relative to the largest value: what is rounded to these between two products of a kernel (attention's weights, activations)
ROUNDED = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 0.0}
# tokens are rounded to float16 in place of 8 bits
PRODUCTS = {"int4_linear", "int8_linear", "int4_experts", "fused_linear", "moe", "latent_cache", "latent_output"}
# without a kernel of their own on a GPU: the screened head pays where bytes of the head are most of a token
CPU_ONLY = {"screened_head"}
# of the interpreter
_MOST_FLOPS = 100_000
# cases that a process is given at a time; each process keeps a GPU's context
_CHUNK, _MOST_PROCESSES = 6, 12
# of the time that is left when the step begins
_SHARE_OF_TIME = 0.5


class OpCase(NamedTuple):
    """One case of an op, in one dtype."""

    op: str
    index: int  # of the spec's cases
    dtype: torch.dtype


class Outcome(NamedTuple):
    """What came of it; both texts empty where the answer is right."""

    case: OpCase
    name: str
    wrong: str
    failed: str


def check_ops(run: Run) -> dict[str, int]:
    """Every case of every op that has a kernel: how many were right.

    A kernel that cannot be made or launched is written down as failed, and the others go on.

    Raises:
        WrongAnswerError: at the first wrong answer.
    """
    right: dict[str, int] = {}
    for case, name, wrong, failed in _outcomes(run):
        if wrong:
            raise WrongAnswerError(wrong)
        if failed:
            run.found.setdefault("failed", {})[name] = failed
        else:
            right[case.op] = right.get(case.op, 0) + 1
    return right


def cases(run: Run) -> Iterator[OpCase]:
    """All there are: the interpreter takes small ones in one dtype; published shapes come in bfloat16 alone."""
    from llmopt.ops import SPECS

    for op, spec in SPECS.items():
        if op in CPU_ONLY:
            continue
        for index, case in enumerate(spec.cases):
            if case.real and (run.interpret or run.quick):
                continue
            dtypes = list(case.params.get("dtypes", spec.tolerance))
            if run.interpret:
                dtypes = dtypes[:1]
            elif case.real and torch.bfloat16 in dtypes:
                dtypes = [torch.bfloat16]
            yield from (OpCase(op, index, dtype) for dtype in dtypes)


def _outcomes(run: Run) -> Iterator[Outcome]:
    if run.interpret:
        yield from (found for case in cases(run) if (found := checked(case, run)))
        return
    every = list(cases(run))
    chunks = [every[i : i + _CHUNK] for i in range(0, len(every), _CHUNK)]
    processes = max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1))
    end, done = run.left() * (1 - _SHARE_OF_TIME), 0
    with get_context("spawn").Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.imap_unordered(partial(_checked_all, quick=run.quick), chunks)
        for _ in chunks:
            try:
                outcomes = found.next(timeout=max(0.0, run.left() - end))
            except NoAnswerError:
                run.found["left_out"].append(f"{len(every) - done} cases of ops")
                return
            done += len(outcomes)
            yield from outcomes


@torch.no_grad()
def _checked_all(some: list[OpCase], quick: bool) -> list[Outcome]:
    run = Run(interpret=False, quick=quick, seconds=0)
    return [found for case in some if (found := checked(case, run))]


def checked(case: OpCase, run: Run) -> Outcome | None:
    """The kernel's answer beside the reference's; None where the interpreter would take too long."""
    from llmopt.ops import SPECS
    from llmopt.ops.int4_linear.reference import sixteen_bit_tokens

    spec = SPECS[case.op]
    one = spec.cases[case.index]
    inputs = spec.make_inputs(type(one)(one.name, {**one.params, "dtype": case.dtype}, one.real), 1)
    if run.interpret and spec.flops(**inputs) > _MOST_FLOPS:
        return None
    name = f"{case.op}, {one.name}, {case.dtype}"
    with sixteen_bit_tokens():
        expected = spec.reference(**inputs)
    try:
        with run.kernels():
            got = spec.run(**tree_map(lambda x: _to(x, run.device), inputs)).to(expected.device)
    except failures() as error:
        return Outcome(case, name, "", f"{type(error).__name__}: {error}")
    rtol, atol = tolerance(spec, case.dtype, expected)
    try:
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        return Outcome(case, name, f"{name}: {error}", "")
    return Outcome(case, name, "", "")


def _to(x: Any, device: torch.device) -> Any:
    from llmopt.ops.fused_linear import Weight

    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, Weight):
        bias = None if x.bias is None else x.bias.to(device)
        return Weight(x.data.to(device), x.rows, x.cols, x.bits, x.group_size, x.asymmetric, bias)
    return x


def tolerance(spec: Any, dtype: torch.dtype, expected: torch.Tensor) -> tuple[float, float]:
    """``(rtol, atol)`` of a Triton kernel beside its op's reference."""
    rtol, atol = spec.tolerance[dtype]
    size = float(expected.float().abs().max()) if expected.numel() else 0.0
    product = spec.name in PRODUCTS
    return max(rtol, 4e-3 if product else 0.0), max(atol, ROUNDED[dtype] * size, 2e-3 * size if product else 0.0)
