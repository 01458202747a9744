"""Optimizes the bundled checkpoints and prints each one's receipt: what `make demo` runs.

Writes report.json (a list of receipts), report.md and report.png: all three in one file each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import llmopt
from llmopt.bench import with_rivals
from llmopt.cli_output import progress
from llmopt.measure import plot, views

ROOT = Path(__file__).parent.parent
MODELS = ("tiny-qwen3", "tiny-ernie4_5_moe", "tiny-deepseek_v3")


def optimize(name: str, passes: Sequence[str] | None) -> llmopt.Report:
    """The receipt of one bundled checkpoint, loaded as anyone would load it."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "assets" / name, dtype="auto", local_files_only=True).eval()
    with progress() as on_event:
        llmopt.optimize(model, with_rivals(passes), on_event=on_event)
    report = llmopt.report(model)
    report.model["name"] = name
    return report


def write(reports: Sequence[llmopt.Report], directory: Path) -> None:
    """report.json, report.md and report.png, each with all receipts."""
    directory.mkdir(parents=True, exist_ok=True)
    record = json.dumps([report.to_dict() for report in reports], indent=2, ensure_ascii=False)
    (directory / "report.json").write_text(record + "\n", encoding="utf-8")
    sections = [views.markdown_compare(reports), *(report.to_markdown() for report in reports)]
    (directory / "report.md").write_text("# llmopt demo\n\n" + "\n".join(sections), encoding="utf-8")
    pictures = [_pixels(report) for report in reports]
    Image.fromarray(np.concatenate(pictures)).save(directory / "report.png")


def _pixels(report: llmopt.Report) -> np.ndarray:
    """The picture of one receipt, ``[height, width, 4]`` uint8; all have one width."""
    canvas = FigureCanvasAgg(plot.make_figure(report))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--passes", type=lambda text: text.split(","), help="comma-separated; default: all")
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help="default: the repository's root")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in MODELS:
            parser.error(f"MODEL: expected one of {', '.join(MODELS)}, got {name}")
    logging.disable_progress_bar()
    reports = []
    for name in arguments.models or MODELS:
        reports.append(optimize(name, arguments.passes))
        reports[-1].print()
        print()
    views.print_compare(reports)
    write(reports, arguments.out)
    print(f"wrote report.json, report.md and report.png to {arguments.out}")


if __name__ == "__main__":
    main()
