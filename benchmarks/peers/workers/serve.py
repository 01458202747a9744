"""The worker's end of the protocol: JSON lines on stdin and stdout. Imports nothing that a peer's environment may lack.

    driver -> worker   {"depth": 128, "tokens": 32, "sequences": 1}        or {"quit": true}
    worker -> driver   {"ready": {...}} once the model is loaded, then {"prefill_s": 0.2, "decode_s": 0.9} per request

Nothing is caught: a worker that fails ends with a traceback on stderr, and the driver reads the reason there.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, Protocol

_PR_SET_PDEATHSIG = 1


class Engine(Protocol):
    """A loaded model."""

    def info(self) -> dict[str, Any]:
        """Versions, settings that matter, and ``weights`` (see :func:`weight_rows`)."""
        ...

    def run(self, depth: int, tokens: int, sequences: int) -> tuple[float, float]:
        """Seconds for the prompts (up to the first token), and for ``tokens`` further tokens per sequence."""
        ...


def weight_rows(tensors: list[tuple[str, str, int, int]]) -> list[dict[str, Any]]:
    """Sums ``(role, format, weights, bytes)`` by role and format. Roles: linear, experts, head, embedding, other.

    A table that serves as both head and embedding is a head.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for role, kind, weights, num_bytes in tensors:
        row = rows.setdefault((role, kind), {"role": role, "format": kind, "weights": 0, "bytes": 0})
        row["weights"] += weights
        row["bytes"] += num_bytes
    return list(rows.values())


def private_stdout() -> Any:
    """The real stdout for replies alone; whatever a library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def serve(engine: Engine, replies: Any) -> None:
    """Answer requests until told to quit or stdin ends."""

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    reply({"ready": engine.info()})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("quit"):
            return
        prefill_s, decode_s = engine.run(asked["depth"], asked["tokens"], asked["sequences"])
        reply({"prefill_s": prefill_s, "decode_s": decode_s})


def die_with_parent() -> None:
    """A worker is stopped while others are timed; should the driver be killed meanwhile, nobody would wake it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
