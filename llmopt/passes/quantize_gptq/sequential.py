"""Walks the decoder block by block: gather Hessians, solve, go on with quantized weights.

True sequential order: inside a block, linears that read the same input form a stage; each stage sees inputs made by the
already quantized stages before it, and each block inputs made by the already quantized blocks before it. Only one block's
Hessians exist at a time. The model's own modules are swapped for stand-ins while a block is worked on and put back after:
nothing is changed until the pass's patch is enabled.

Beside the quantized path runs the exact one, through the model's own modules on its own activations: what a stage should
have been given is needed to make up for what it is given (:func:`solver.solve`, ``drift``).

On processors that have no products of the model's dtype blocks compute in float32: torch's bfloat16 linears take six times as
long as float32 ones where there is only AVX2. A block's weights are float32 only while it runs (:meth:`Paths.computing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from llmopt.errors import QuantizationError
from llmopt.measure import environment
from llmopt.models.base import LinearSite, ResolvedModel

# tokens of one forward pass through a block; bounds activation memory
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

    def run(self, block: nn.Module) -> Iterator[torch.Tensor]:
        """Outputs of ``block``, batch by batch."""
        for hidden, kwargs in zip(self.hidden, self.kwargs, strict=True):
            out = block(hidden, **kwargs)
            yield out[0] if isinstance(out, tuple) else out

    def twin(self) -> BlockInputs:
        """The same inputs, to be advanced on another path."""
        return BlockInputs(list(self.hidden), self.kwargs, self.dtype)

    def advance(self, block: nn.Module, name: str) -> None:
        """Replace the inputs by the block's outputs, in place, so that only one set exists."""
        for i, out in enumerate(self.run(block)):
            if not torch.isfinite(out.to(self.dtype)).all():
                raise QuantizationError(f"{name}: output holds NaN or Inf during calibration")
            self.hidden[i] = out


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
        self._swapped: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []

    def __enter__(self) -> StandIns:
        return self

    def __exit__(self, *exception: object) -> None:
        self._show_originals()

    def swap(self, parent: nn.Module, attr: str, module: nn.Module) -> None:
        self._swapped.append((parent, attr, getattr(parent, attr), module))
        setattr(parent, attr, module)

    @contextmanager
    def originals(self) -> Iterator[None]:
        """The block as it was, for a while."""
        self._show_originals()
        try:
            yield
        finally:
            for parent, attr, _, module in self._swapped:
                setattr(parent, attr, module)

    def _show_originals(self) -> None:
        for parent, attr, module, _ in reversed(self._swapped):
            setattr(parent, attr, module)


@dataclass(slots=True)
class Paths:
    """The calibration on its two ways through the model, and the block both have come to."""

    block: nn.Module
    quantized: BlockInputs
    exact: BlockInputs
    stand_ins: StandIns

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For a while the block's weights, of both paths, are of the dtype that activations have: a copy of one block.

        In the end they are what they were, bit for bit, whatever happens.
        """
        dtype = self.exact.hidden[0].dtype
        tensors = {*self.block.parameters(), *self.block.buffers()}
        with self.stand_ins.originals():
            tensors |= {*self.block.parameters(), *self.block.buffers()}
        weights = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in _PRODUCTS and tensor.dtype != dtype]
        try:
            for tensor, data in weights:
                tensor.data = data.to(dtype)
            yield
        finally:
            for tensor, data in weights:
                tensor.data = data

    def reaching(self, parent: nn.Module, attr: str) -> Iterator[tuple[Inputs, Inputs]]:
        """What module ``parent.attr`` of the block is given, on the quantized and on the exact path, batch by batch.

        To be asked for while the block is :meth:`computing`.
        """
        batches = zip(self.quantized.hidden, self.exact.hidden, self.quantized.kwargs, strict=True)
        for hidden, exact_hidden, kwargs in batches:
            given = _inputs_of(self.block, getattr(parent, attr), hidden, kwargs)
            with self.stand_ins.originals():
                exact = _inputs_of(self.block, getattr(parent, attr), exact_hidden, kwargs)
            # a block may leave a module out, as experts that no token of a batch is routed to
            if given is not None and exact is not None:
                yield given, exact

    def advance(self, name: str) -> None:
        """Through the block, each path with its own weights."""
        with self.computing():
            self.quantized.advance(self.block, name)
            with self.stand_ins.originals():
                self.exact.advance(self.block, name)


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
