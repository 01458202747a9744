"""What each contender really stores per weight, counted in the files and modules themselves.

    python -m benchmarks.peers.weight_formats [--shape qwen3-0.6b] [--json FILE] [--document docs/weight-formats.md]
    python -m benchmarks.peers.weight_formats --record FILE     # of a run of benchmarks.peers: loads nothing

Loads every contender once, times nothing, and prints a Markdown table; --document puts it between the markers there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import contenders
from benchmarks.peers.__main__ import ROOT, say
from benchmarks.peers.contenders import EAGER, FIELD, OURS, Setup
from benchmarks.peers.record import Record, bits_per_weight
from benchmarks.peers.worker import ContenderError
from llmopt.measure import environment
from llmopt.measure import format as fmt
from llmopt.models.published import SHAPES, find

BEGIN, END = "<!-- formats: begin (written by benchmarks/peers/weight_formats.py) -->", "<!-- formats: end -->"
# stock runs eager's weights, ik_llama.cpp llama.cpp's file
COUNTED = (OURS, "llama-cpp-q4_0", "llama-cpp-q4_k_m", "openvino-int4", "torchao-int4", EAGER)
Rows = list[dict[str, Any]]


def gather(setup: Setup, names: Sequence[str] = COUNTED) -> dict[str, Rows]:
    """What the workers say of their weights; one at a time is loaded."""
    found: dict[str, Rows] = {}
    for name in names:
        say(f"{name}: loading")
        timed = None
        try:
            timed = contenders.make(name, setup)
            found[name] = timed.start(3600)["weights"]
        except ContenderError as error:
            say(f"{name}: {error}")
        finally:
            if timed is not None:
                timed.close()
    return found


def bytes_per_token(rows: Rows, config: Mapping[str, Any]) -> float:
    """Bytes of weights that decoding one token reads: all but an embedding of its own; of the experts those chosen."""
    total = 0.0
    for row in rows:
        if row["role"] != "embedding":
            total += row["bytes"] * (_chosen(config) if row["role"] == "experts" else 1)
    return total


def _chosen(config: Mapping[str, Any]) -> float:
    used = next(config[key] for key in ("num_experts_per_tok", "moe_k") if key in config)
    experts = next(config[key] for key in ("num_experts", "moe_num_experts", "n_routed_experts") if key in config)
    return float(used / experts)


def table(found: Mapping[str, Rows], shape: str) -> str:
    """One line a contender: formats, bits with their scales, bytes in all and per token."""
    lines = [
        "| | linears | head | embedding | all weights | read per token |",
        "| --- | --- | --- | --- | --: | --: |",
    ]
    for name, rows in found.items():
        parts = [_part(rows, "linear", "experts"), _part(rows, "head"), _part(rows, "embedding") or "the head's"]
        stored = fmt.size(sum(row["bytes"] for row in rows))
        read = fmt.size(bytes_per_token(rows, find(shape).config))
        lines.append(f"| {FIELD[name].label} | {' | '.join(parts)} | {stored} | {read} |")
    return "\n".join(lines)


def _part(rows: Rows, *roles: str) -> str:
    """``4.50 (Q4_0)``: bits with scales, and the formats they come from, the largest first."""
    bits = bits_per_weight([dict(row) for row in rows], *roles)
    if bits is None:
        return ""
    held = sorted((row for row in rows if row["role"] in roles and row["weights"]), key=lambda row: -row["bytes"])
    kinds = list(dict.fromkeys(row["format"] for row in held))
    return f"{bits:.3f} ({', '.join(kinds)})"


def put(document: Path, text: str) -> None:
    """Replace what stands between the markers.

    Raises:
        ValueError: the markers are not there.
    """
    old = document.read_text(encoding="utf-8")
    head, found, rest = old.partition(BEGIN)
    _, also, tail = rest.partition(END)
    if not (found and also):
        raise ValueError(f"{document.name}: expected {BEGIN} and {END}")
    document.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--record", type=Path)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--document", type=Path)
    args = parser.parse_args(words)
    shape = args.shape
    if args.record:
        record = Record.from_json(args.record)
        shape = record.shape
        found = {row.name: row.info["weights"] for row in record.rows if row.name in COUNTED and "weights" in row.info}
    else:
        setup = Setup(shape, (), environment.visible_cores(), args.cache.resolve(), say)
        found = gather(setup)
    if args.json:
        args.json.write_text(json.dumps({"shape": shape, "weights": found}, indent=1) + "\n", encoding="utf-8")
    text = table(found, shape)
    if args.document:
        put(args.document, text)
    print(text, file=sys.stdout)


if __name__ == "__main__":
    main()
