"""Walks the decoder block by block: gather Hessians, solve, go on with quantized weights.

True sequential order: inside a block, linears that read the same input form a stage; each stage sees inputs made by the
already quantized stages before it, and each block inputs made by the already quantized blocks before it. Only one block's
Hessians exist at a time. The model's own modules are swapped for stand-ins while a block is worked on and put back after:
nothing is changed until the pass's patch is enabled.

Beside the quantized path runs the exact one, through the model's own modules on its own activations: what a stage should
have been given is needed to make up for what it is given (:func:`solver.solve`, ``drift``). It goes through a block once,
first, and what each stage is given is kept. The quantized path comes again for every stage; what is quantized to its end, the
attention or the experts, is not computed a third time (:class:`Remembered`).

On processors that have no products of the model's dtype blocks compute in float32: torch's bfloat16 linears take several times
as long as float32 ones where there is only AVX2. A block's weights are float32 only while it runs (:meth:`Paths.computing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from llmopt.errors import QuantizationError
from llmopt.measure import environment
from llmopt.models.base import LinearSite, ResolvedModel

# tokens of one forward pass through a block; bounds activation memory, but for what is kept: hidden states, and on the exact
# path what the stages of one block are given
_BATCH_TOKENS = 2048
# processor flags, any of which gives torch products of a dtype that are worth it
_PRODUCTS = {torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"}, torch.float16: {"avx512_fp16"}}

Inputs: TypeAlias = tuple[torch.Tensor, ...]


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What blocks with weights of ``dtype`` compute in while they are calibrated: that, or float32 where it is faster."""
    if device.type != "cpu" or dtype not in _PRODUCTS or _PRODUCTS[dtype] & set(environment.cpu()["isa"]):
        return dtype
    return torch.float32


class _Captured(Exception):
    pass


class BlockInputs:
    """What each calibration batch feeds to the current decoder block: hidden states and the arguments that stay.

    ``dtype`` is the model's, whose range they must fit; they may be computed in another (:func:`computing_dtype`).
    """

    def __init__(self, hidden: list[torch.Tensor], kwargs: list[dict[str, Any]], dtype: torch.dtype) -> None:
        self.hidden = hidden
        self.kwargs = kwargs
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.hidden)

    def twin(self) -> BlockInputs:
        """The same inputs, to be advanced on another path."""
        return BlockInputs(list(self.hidden), self.kwargs, self.dtype)

    def advance(self, batch: int, block: nn.Module) -> None:
        """Replace one batch by the block's output, in place, so that only one set exists."""
        out = block(self.hidden[batch], **self.kwargs[batch])
        self.hidden[batch] = out[0] if isinstance(out, tuple) else out

    def check(self, name: str) -> None:
        """Raises QuantizationError if what block ``name`` has put out does not fit the model's dtype."""
        if not all(torch.isfinite(hidden.to(self.dtype)).all() for hidden in self.hidden):
            raise QuantizationError(f"{name}: output holds NaN or Inf during calibration")


# of a block's arguments: what comes from the block before, and the cache, by either of transformers' names
_NOT_KEPT = ("hidden_states", "past_key_values", "cache", "use_cache")


def capture_inputs(resolved: ResolvedModel, rows: list[torch.Tensor]) -> BlockInputs:
    """Run the model up to its first decoder block on all calibration rows."""
    first = resolved.layers[0].module
    dtype = resolved.embedding.weight.dtype
    computing = computing_dtype(dtype, resolved.device)
    hidden: list[torch.Tensor] = []
    kwargs: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append((args[0] if args else named["hidden_states"]).to(computing))
        kwargs.append({k: _computing(v, computing) for k, v in named.items() if k not in _NOT_KEPT})
        raise _Captured

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    per_batch = max(1, _BATCH_TOKENS // len(rows[0]))
    try:
        for start in range(0, len(rows), per_batch):
            try:
                batch = torch.stack(rows[start : start + per_batch]).to(resolved.device)
                resolved.model(input_ids=batch, use_cache=False)
            except _Captured:
                continue
    finally:
        handle.remove()
    return BlockInputs(hidden, kwargs, dtype)


def _computing(argument: Any, dtype: torch.dtype) -> Any:
    """An argument of a block for computing in ``dtype``: masks and rotary factors; what is float32 anyway stays."""
    if isinstance(argument, tuple):
        return tuple(_computing(item, dtype) for item in argument)
    short = isinstance(argument, torch.Tensor) and argument.dtype in _PRODUCTS
    return argument.to(dtype) if short else argument


class StandIns:
    """Swaps child modules of the block at work; leaving the context puts all of them back, whatever happens."""

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, str, nn.Module]] = []

    def __enter__(self) -> StandIns:
        return self

    def __exit__(self, *exception: object) -> None:
        for parent, attr, module in reversed(self._originals):
            setattr(parent, attr, module)

    def swap(self, parent: nn.Module, attr: str, module: nn.Module) -> None:
        self._originals.append((parent, attr, getattr(parent, attr)))
        setattr(parent, attr, module)


class Remembered(nn.Module):
    """Stands in for a module whose weights are final, of which it asks each batch's output once.

    Args:
        module: called as a part of the block.
        batch: number of the batch that the block runs on.
    """

    def __init__(self, module: nn.Module, batch: Callable[[], int]) -> None:
        super().__init__()
        self.module, self._batch = module, batch
        self._outputs: dict[int, Any] = {}

    def forward(self, *args: Any, **named: Any) -> Any:
        batch = self._batch()
        if batch not in self._outputs:
            out = self.module(*args, **named)
            # behind an attention's output come its probabilities, which are large and which no block reads
            self._outputs[batch] = (out[0], *[None] * (len(out) - 1)) if isinstance(out, tuple) else out
        return self._outputs[batch]


@dataclass(slots=True)
class Paths:
    """The calibration on its two ways through the model, and the block both have come to."""

    block: nn.Module
    quantized: BlockInputs
    exact: BlockInputs
    stand_ins: StandIns
    _batch: int = 0
    # by module: what it is given on the exact path, batch by batch; modules of one stage share a list
    _exact: dict[nn.Module, list[Inputs | None]] = field(default_factory=dict)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For a while the block's weights are of the dtype that activations have: a copy of one block.

        In the end they are what they were, bit for bit, whatever happens.
        """
        dtype = self.exact.hidden[0].dtype
        tensors = {*self.block.parameters(), *self.block.buffers()}
        weights = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in _PRODUCTS and tensor.dtype != dtype]
        try:
            for tensor, data in weights:
                tensor.data = data.to(dtype)
            yield
        finally:
            for tensor, data in weights:
                tensor.data = data

    def advance_exact(self, stages: Sequence[Sequence[nn.Module]]) -> None:
        """Through the block on the exact path, which is to come before the first stand-in.

        Args:
            stages: modules that are given the same; what that is waits for :meth:`reaching`.
        """
        given: dict[int, Inputs] = {}

        def keep(stage: int) -> Callable[..., None]:
            return lambda module, args, named: given.__setitem__(stage, (*args, *named.values()))

        kept: list[list[Inputs | None]] = [[] for _ in stages]
        self._exact = {module: kept[i] for i, stage in enumerate(stages) for module in stage}
        handles = [
            module.register_forward_pre_hook(keep(i), with_kwargs=True)
            for i, stage in enumerate(stages)
            for module in stage
        ]
        try:
            with self.computing():
                for batch in range(len(self.exact)):
                    self.exact.advance(batch, self.block)
                    for i, seen in enumerate(kept):
                        # a block may leave a module out, as experts that no token of a batch is routed to
                        seen.append(given.pop(i, None))
        finally:
            for handle in handles:
                handle.remove()

    def reaching(self, parent: nn.Module, attr: str) -> Iterator[tuple[Inputs, Inputs]]:
        """What module ``parent.attr`` of the block is given, on the quantized and on the exact path, batch by batch.

        To be asked for once a stage, while the block is :meth:`computing`.
        """
        module = getattr(parent, attr)
        for batch in self._batches():
            given = _inputs_of(self.block, module, self.quantized.hidden[batch], self.quantized.kwargs[batch])
            exact, self._exact[module][batch] = self._exact[module][batch], None
            if given is not None and exact is not None:
                yield given, exact

    def remember(self, parent: nn.Module, attr: str, module: nn.Module) -> None:
        """From here on ``module``, whose weights are final, stands in for ``parent.attr``."""
        self.stand_ins.swap(parent, attr, Remembered(module, lambda: self._batch))

    def advance(self, name: str) -> None:
        """Through the block on the quantized path, the last time.

        Raises:
            QuantizationError: what block ``name`` puts out, on either path, does not fit the model's dtype.
        """
        with self.computing():
            for batch in self._batches():
                self.quantized.advance(batch, self.block)
        self.quantized.check(name)
        self.exact.check(name)

    def _batches(self) -> Iterator[int]:
        """Numbers of the batches, each while it is the one that the block runs on."""
        for batch in range(len(self.quantized)):
            self._batch = batch
            yield batch


def _inputs_of(block: nn.Module, module: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Inputs | None:
    """Tensors that ``module`` is called with when the block runs (so far, and no further)."""
    seen: list[Inputs] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        seen.append((*args, *named.values()))
        raise _Captured

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        block(hidden, **kwargs)
    except _Captured:
        return seen[0]
    finally:
        handle.remove()
    return None


class Moments:
    """Means over the calibration tokens of what one linear is given: ``x x^T``, and ``(exact - x) x^T`` (float32)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._square, self._drift = (torch.zeros(size, size, device=device) for _ in range(2))
        self.tokens = 0

    def add(self, x: torch.Tensor, exact: torch.Tensor | None = None) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        self._square.addmm_(flat.T, flat)
        if exact is not None:
            self._drift.addmm_((exact.reshape(flat.shape).float() - flat).T, flat)
        self.tokens += flat.shape[0]

    def hessian(self) -> torch.Tensor:
        return self._square / max(self.tokens, 1)

    def drift(self) -> torch.Tensor:
        """Shrunk by what a regression on so few tokens would fit to noise."""
        return self._drift / (self.tokens + self._drift.shape[0])


def stage_moments(paths: Paths, site: LinearSite) -> Moments:
    """Moments of what reaches ``site`` when the calibration runs through its block (up to the site, no further)."""
    moments = Moments(site.module.in_features, site.module.weight.device)
    with paths.computing():
        for given, exact in paths.reaching(site.parent, site.attr):
            moments.add(given[0], exact[0])
    if moments.tokens == 0:
        raise QuantizationError(f"{site.name}: no calibration token reached this layer")
    return moments


@dataclass(slots=True)
class RoutedTokens:
    """Inputs of a fused-experts module: hidden states on both paths, and which experts they went to on the quantized one."""

    hidden: torch.Tensor  # [T, H]
    exact: torch.Tensor  # [T, H]
    index: torch.Tensor  # [T, k]
    weights: torch.Tensor  # [T, k] float32


def routed_tokens(paths: Paths, parent: nn.Module, attr: str, name: str) -> RoutedTokens:
    """Run the calibration through a block and keep what reaches its experts."""
    hidden, exact, index, weights = [], [], [], []
    with paths.computing():
        for given, wanted in paths.reaching(parent, attr):
            hidden.append(given[0].reshape(-1, given[0].shape[-1]))
            exact.append(wanted[0].reshape(-1, wanted[0].shape[-1]))
            index.append(given[1])
            weights.append(given[2].float())
    if not hidden:
        raise QuantizationError(f"{name}: no calibration token reached the experts")
    return RoutedTokens(torch.cat(hidden), torch.cat(exact), torch.cat(index), torch.cat(weights))
