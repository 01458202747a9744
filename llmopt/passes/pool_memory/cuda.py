"""Options of CUDA's caching allocator, while they can still be set."""

from __future__ import annotations

import torch

from llmopt import env

_OPTIONS = "expandable_segments:True"


def set_options(device: torch.device) -> str:
    """Let segments grow, unless the process has chosen for itself or has allocated already: then it would not hold for what
    is there. Returns what was done, for the receipt."""
    given = env.cuda_allocator_options()
    if given:
        return f"allocator options as the process was given them: {given}"
    if torch.cuda.memory_reserved(device):
        return (
            f"allocator options left alone: the process has allocated already (PYTORCH_ALLOC_CONF={_OPTIONS} sets them)"
        )
    torch.cuda.memory._set_allocator_settings(_OPTIONS)
    return f"allocator options set: {_OPTIONS}"
