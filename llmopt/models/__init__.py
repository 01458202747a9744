"""Supported model families and the lookup that finds their parts in a model. A new family is one file and one line."""

from __future__ import annotations

import difflib

from torch import nn

from llmopt.errors import UnsupportedModelError
from llmopt.models import (
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    llama,
    qwen2,
    qwen3,
    qwen3_moe,
)
from llmopt.models.base import ModelFamily, ResolvedModel, resolve

FAMILIES: tuple[ModelFamily, ...] = (
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    ernie4_5.FAMILY,
    ernie4_5_moe.FAMILY,
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
)

__all__ = ["FAMILIES", "ModelFamily", "ResolvedModel", "family_for", "resolve_model"]


def family_for(model_type: str) -> ModelFamily:
    """The family of a transformers ``model_type``.

    Raises:
        UnsupportedModelError: there is none; lists the supported ones and the nearest.
    """
    by_type = {family.model_type: family for family in FAMILIES}
    if model_type in by_type:
        return by_type[model_type]
    near = difflib.get_close_matches(str(model_type), by_type, n=2)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise UnsupportedModelError(
        f"model_type: expected one of {', '.join(by_type)}, got {model_type!r}{hint}. "
        "Adding a family takes one data file in llmopt/models (see CONTRIBUTING.md)"
    )


def resolve_model(model: nn.Module) -> ResolvedModel:
    """Look the family of ``model`` up by its config, and find every declared part.

    Raises:
        UnsupportedModelError: no config, an unsupported family, or parts missing from the model.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"model: expected a transformers causal LM with a config, got {type(model).__name__}"
        )
    return resolve(model, family_for(getattr(config, "model_type", "")))
