"""How often the screened head finds the token that the 8-bit head finds, and how many rows it scores for that.

    python benchmarks/screened_head.py [--positions 4096] [--json FILE] [--markdown FILE]

Bundled checkpoints: quantized (head of 8 bits), after every token of `assets/heldout.txt`.  Heads of published sizes have
random rows of several kinds, rounded to 8 bits as the pass does it, and two kinds of hidden states: those of the Qwen3-0.6B
shape with random weights, where no token stands out, and heavy-tailed ones with a few outlier dimensions.  Each margin is a
setting of the op itself, against the argmax of all its 8-bit logits; the last columns ask instead how often the right row is
among the best C of the 4-bit logits alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmopt.measure import environment
from llmopt.models import resolve_model
from llmopt.ops import shapes
from llmopt.ops.fused_linear import Weight, fused_linear
from llmopt.ops.int4_linear import layout
from llmopt.ops.screened_head import MARGIN, reference, screened_head
from llmopt.passes.base import PassContext
from llmopt.passes.quantize_gptq import QuantizeGptq, calibrate
from llmopt.passes.quantize_gptq.direct import build_quantized
from llmopt.passes.quantize_gptq.rounding import Grid, round_to_nearest
from llmopt.runtime.engine import Engine
from llmopt.runtime.rows import Rows

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny-qwen3", "tiny-ernie4_5_moe", "tiny-deepseek_v3")
SIZES = {"Qwen3-0.6B": shapes.HEAD_QWEN3_0_6B, "ERNIE-4.5-0.3B": (103424, 1024), "DeepSeek-V2-Lite": (102400, 2048)}
MARGINS = (0.0, 5.0, 10.0, 15.0, 20.0, MARGIN, 45.0)
COUNTS = (1, 4, 16, 64, 256)
BLOCK, ROW_TOKENS = 64, 256
RANKED = 256  # positions whose rows are ranked by their 4-bit logits


@dataclass(slots=True)
class Result:
    """One head and one set of hidden states."""

    head: str
    rows: int
    hidden: str
    positions: int
    wrong: dict[str, int]  # margin -> positions with another token than the 8-bit head's
    scored: dict[str, float]  # margin -> mean rows scored with 8 bits
    among: dict[str, float]  # C -> share of positions whose row is among the first C of the screen


def measure(head: str, weight: Weight, hidden: str, x: torch.Tensor) -> Result:
    """``x`` [P, K]: normalized hidden states."""
    tiles = weight.data.shape[0]
    wrong, scored = dict.fromkeys(MARGINS, 0), dict.fromkeys(MARGINS, 0)
    ranks: list[torch.Tensor] = []
    for part in x.split(BLOCK):
        logits = torch.empty(len(part), weight.rows)
        fused_linear(part, (weight,), logits)
        right = logits.argmax(-1)
        for margin in MARGINS:
            ids, count = torch.empty(len(part), dtype=torch.int64), torch.empty(len(part), dtype=torch.int32)
            screened_head(part, weight, ids, margin=margin, scored=count)
            wrong[margin] += int((ids != right).sum())
            scored[margin] += int(count.sum())
        if sum(map(len, ranks)) < RANKED:
            coarse, _ = reference.screen(part, weight)
            ranks.append((coarse > coarse.gather(-1, right[:, None])).sum(-1))
    rank = torch.cat(ranks)
    return Result(
        head, weight.rows, hidden, len(x), {f"{m:g}": n for m, n in wrong.items()},
        {f"{m:g}": min(16 * n / len(x), 16 * tiles) for m, n in scored.items()},
        {str(c): float((rank < c).float().mean()) for c in COUNTS},
    )  # fmt: skip


# ---- the bundled checkpoints


def bundled(name: str) -> Result:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "assets" / name, dtype=torch.bfloat16, local_files_only=True)
    resolved = resolve_model(model.eval())
    rows = calibrate.rows(None, model, row_tokens=ROW_TOKENS)
    context = PassContext(resolved, torch.device("cpu"), lambda event: None, calibration=rows)
    QuantizeGptq(group_size=64).apply(context).patch.enable()
    text = (ROOT / "assets" / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.stack(calibrate.rows(text, model, num_rows=10**6, row_tokens=ROW_TOKENS))
    engine = Engine(resolved)
    x = torch.cat([hidden_states(engine, part) for part in ids.split(8)])
    return measure(name, engine.head, "held-out text", x)


@torch.no_grad()
def hidden_states(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """What the head sees after every token of ``ids`` [S, T]: ``[S * T, K]``."""
    sequences, tokens = ids.shape
    h = torch.empty(ids.numel(), engine.hidden_size)
    engine.embed(ids.reshape(-1), h)
    rows = Rows.of_batch(sequences, tokens, 0, None, None, torch.device("cpu"))
    engine.hidden(h, rows, engine.new_cache(sequences, tokens), tokens)
    return torch.nn.functional.rms_norm(h, (engine.hidden_size,), engine.norm, engine.eps)


# ---- heads of published sizes


def normal(n: int, k: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(n, k, generator=g) * 0.02


def heavy_tails(n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Student's t with 3 degrees of freedom; norms of rows over an order of magnitude; a few large columns."""
    squares = sum(torch.randn(n, k, generator=g).square_() for _ in range(3))
    w = torch.randn(n, k, generator=g) / (squares / 3).sqrt_()
    w[:, torch.randint(0, k, (6,), generator=g)] *= 8
    return w * torch.randn(n, 1, generator=g).mul(0.5).exp() * 0.02


def one_large_a_group(n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """One weight of each group sets the scale, and the others share the codes next to zero."""
    w = torch.randn(n, k // 128, 128, generator=g) * 0.02
    at = torch.randint(0, 128, (n, k // 128, 1), generator=g)
    return w.scatter(-1, at, 0.5 * torch.randn(n, k // 128, 1, generator=g).sign()).view(n, k)


def near_copies(n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Families of 16 rows that differ by a hundredth, as spellings of a word might."""
    w = normal(n // 16, k, g).repeat_interleave(16, 0)
    return w + normal(len(w), k, g) * 0.01


KINDS: tuple[Callable[[int, int, torch.Generator], torch.Tensor], ...] = (
    normal, heavy_tails, one_large_a_group, near_copies,
)  # fmt: skip


def packed(w: torch.Tensor) -> Weight:
    codes, scales, _ = round_to_nearest(w, Grid(8, True), 128)
    return Weight(layout.pack(codes, scales, None, group_size=128, bits=8), *w.shape, 8, 128)


def outlier_states(positions: int, k: int, g: torch.Generator) -> torch.Tensor:
    x = torch.randn(positions, k, generator=g) * torch.randn(positions, k, generator=g).exp()
    x[:, torch.randint(0, k, (4,), generator=g)] *= 20
    return torch.nn.functional.rms_norm(x, (k,))


def published(positions: int) -> Iterator[Result]:
    g = torch.Generator().manual_seed(0)
    engine = Engine(resolve_model(build_quantized("qwen3-0.6b")[0]))
    ids = torch.randint(0, engine.vocab_size, (-(-positions // ROW_TOKENS), ROW_TOKENS), generator=g)
    of_model = torch.cat([hidden_states(engine, row[None]) for row in ids])[:positions]
    yield measure("Qwen3-0.6B, uniform codes", engine.head, "random model", of_model)
    for size, (n, k) in SIZES.items():
        for kind in KINDS:
            weight = packed(kind(n, k, g))
            name = f"{size}, {kind.__name__.replace('_', ' ')}"
            if k == of_model.shape[1]:
                yield measure(name, weight, "random model", of_model)
            yield measure(name, weight, "outliers", outlier_states(positions, k, g))


# ---- the table


def cells(r: Result) -> list[str]:
    margins = [f"{r.wrong[f'{m:g}']} ({r.scored[f'{m:g}']:.0f})" for m in MARGINS]
    return [r.head, r.hidden, str(r.positions), *margins, *(f"{r.among[str(c)]:.1%}" for c in COUNTS)]


def table(results: Sequence[Result]) -> str:
    heading = [
        "head",
        "hidden states",
        "positions",
        *(f"margin {m:g}" for m in MARGINS),
        *(f"best {c}" for c in COUNTS),
    ]
    lines = [heading, ["---"] * len(heading), *map(cells, results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096, help="of each head with random rows; default 4096")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    results: list[Result] = []
    print(table([]), flush=True)
    for found in itertools.chain(map(bundled, MODELS), published(arguments.positions)):
        results.append(found)
        print(table([found]).splitlines()[-1], flush=True)
    seen: dict[str, Any] = environment.capture()
    command = "python " + shlex.join(["benchmarks/screened_head.py", "--positions", str(arguments.positions)])
    if arguments.json:
        record = {
            "environment": seen,
            "command": command,
            "margin": MARGIN,
            "results": list(map(dataclasses.asdict, results)),
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(
            f"# The screened head beside the 8-bit head, {seen['date'][:10]}\n\n    {command}\n\n"
            f"Under a margin: positions with another token, and in brackets the mean number of rows scored with 8 bits. "
            f"The op's margin is {MARGIN:g}. Under best C: how often the right row is among the best C by 4-bit logits alone "
            f"({RANKED} positions).\n\n{table(results)}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
