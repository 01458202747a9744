"""Tensors taken out of the engine's blocks and put back, so that a part of the decoder is a function of its tensors.

Parts whose signatures agree are compiled once: all layers of a kind, whatever the depth of the model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# a layer's place in the model: all layers of a kind are one function
_PLACE = "index"


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors inside a block, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for _, inner in _fields(value) for tensor in tensors_of(inner)]


def with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """A copy of a block with other tensors in the places of :func:`tensors_of`; its place in the model becomes 0."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    changed = {name: with_tensors(inner, tensors) for name, inner in _fields(value)}
    if isinstance(value, tuple | list):
        return type(value)(changed.values())
    if isinstance(value, dict):
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **changed)
    if not changed:
        return value
    made = copy.copy(value)
    vars(made).update(changed)
    if _PLACE in vars(made):
        setattr(made, _PLACE, 0)
    return made


def signature(value: Any) -> Any:
    """All that decides what is compiled for a block: its kind, options, and the shapes and dtypes of its tensors."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype).removeprefix("torch."), list(value.shape)]
    if _opaque(value):
        return None
    if isinstance(value, tuple | list):
        return [signature(inner) for inner in value]
    if isinstance(value, dict):
        return {str(name): signature(inner) for name, inner in value.items()}
    fields = vars_of(value)
    if fields is None:
        return repr(value)
    inner = {name: signature(found) for name, found in fields.items() if name != _PLACE}
    return {"kind": type(value).__name__, **inner}


def vars_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a block or dataclass; None of a plain value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    own = type(value).__module__.startswith("llmopt.")
    return dict(vars(value)) if own and hasattr(value, "__dict__") else None


def _fields(value: Any) -> list[tuple[Any, Any]]:
    if _opaque(value):
        return []
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if isinstance(value, dict):
        return list(value.items())
    return list((vars_of(value) or {}).items())


def _opaque(value: Any) -> bool:
    # a module keeps weights that no step reads
    return isinstance(value, nn.Module | type)
