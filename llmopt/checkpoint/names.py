"""Names of tensors: as the model has them, and as the files of its family have them.

transformers 5 fuses routed experts and moves some parameters on load; files, and every other tool, keep the names of
the original releases. The renaming is transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llmopt.models.base import ExpertsSite, MlpSpec, ModelFamily, MoeSpec


def disk_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Name on disk of each parameter or buffer (fused experts apart, see :func:`expert_name`)."""
    from transformers.core_model_loading import revert_weight_conversion

    names = list(names)
    if not names:
        return {}
    # all at once, because the renaming is worked out anew in each call; the size of a probe tells where it came from
    probes = {name: torch.empty(i, device="meta") for i, name in enumerate(names)}
    renamed = revert_weight_conversion(model, probes)
    result = {names[probe.shape[0]]: disk for disk, probe in renamed.items()}
    assert len(renamed) == len(result) == len(names), f"expected one name on disk each, got {renamed.keys()}"
    return result


def expert_name(experts: str, spec: MoeSpec, expert: int, proj: str) -> str:
    """Name on disk of one linear of one routed expert, without ``.weight``.

    Args:
        experts: full name of the fused-experts module in the model.
        spec: the family's MoE block.
        expert: its number.
        proj: the linear: ``gate_proj``, ``up_proj`` or ``down_proj``.
    """
    block = experts.removesuffix(f".{spec.experts}")
    return f"{block}.{spec.disk_name.format(expert=expert, proj=proj)}"


def expert_projections(mlp: MlpSpec) -> tuple[str, str, str]:
    """Names of an expert's linears: gate, up, down."""
    return mlp.gate, mlp.up, mlp.down


def fused_names(site: ExpertsSite) -> tuple[str, str]:
    """Full names of a site's fused parameters: ``gate_up [E, 2I, H]`` and ``down [E, H, I]``."""
    return f"{site.name}.{site.spec.gate_up}", f"{site.name}.{site.spec.down}"


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, buffer or submodule, and the attribute's name."""
    path, _, attr = name.rpartition(".")
    return model.get_submodule(path), attr


def is_kept_fp32(family: ModelFamily, name: str) -> bool:
    """True for what a family keeps in float32 whatever the model's dtype."""
    return any(fragment in name for fragment in family.keep_fp32)
