"""What an op declares about itself, once, for the tests, the microbenchmark and the docs alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One set of shapes and options. ``real`` marks shapes of published models; benchmarks run those."""

    name: str
    params: Mapping[str, Any]
    real: bool = False


@dataclass(frozen=True, slots=True)
class OpSpec:
    """An op, its plain-torch reference and the cases that tests and benchmarks walk.

    ``run`` and ``reference`` take the keyword arguments that ``make_inputs(case, seed)`` returns and give one tensor.
    ``bytes_moved`` and ``flops`` take the same; bytes are those that must come from memory at least once.
    An op on packed bytes alone has no floating input: its tolerance is float32's. A case whose ``params`` have ``dtypes``
    comes in those only.
    ``tolerance`` maps the dtype of the floating inputs to (rtol, atol) against the reference.
    """

    name: str
    run: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    make_inputs: Callable[[Case, int], Inputs]
    cases: tuple[Case, ...]
    tolerance: Mapping[torch.dtype, tuple[float, float]]
    bytes_moved: Callable[..., int]
    flops: Callable[..., int]
    # an op that writes to tensors it is given: `run` allocates them, and this gives the torch op's arguments by name,
    # outputs included, for the same inputs; None: they are run's own
    torch_arguments: Callable[..., Inputs] | None = None
    # further implementations worth timing beside ours (eager torch, SDPA...): name -> callable on the same inputs that
    # gives the tensor, or a function without arguments to be timed in its place (set-up then stays outside)
    rivals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
