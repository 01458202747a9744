"""Calls that what llmopt put in place does not cover: counted by reason, and logged the first time."""

from __future__ import annotations

import logging

_LOG = logging.getLogger("llmopt")


def count(counts: dict[str, int], reason: str, what: str) -> None:
    """One call more.

    Args:
        counts: reason -> calls; it stands in the receipt's details.
        reason: why the call is not covered.
        what: the pass, and what runs instead: "fuse_kernels: the model's own layers run".
    """
    if reason not in counts:
        counts[reason] = 0
        _LOG.warning("%s: %s", what, reason)
    counts[reason] += 1
