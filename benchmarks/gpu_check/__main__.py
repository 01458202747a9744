"""Everything llmopt does on an NVIDIA GPU, checked and then timed, in one command of some minutes.

    python -m benchmarks.gpu_check [--quick] [--seconds 540] [--json FILE] [--markdown FILE]
    python -m benchmarks.gpu_check --interpret          # without a GPU: small cases by Triton's interpreter, nothing timed

In this order, and not a step further than the first wrong answer: every op against its reference, in several processes; every
family's small model through the engine (launched, and as a CUDA graph) against the model itself; every pass on every family
(applied, or why not; logits; undone bit by bit); tokens decoded ahead of the host against those one by one; kernels against the
ceilings measured beside them; what swap_flash_attention chooses from; and decoding on published shapes with random weights,
eager bfloat16 too. What is found is written after every step.
Exits with 1 where an answer is wrong, a step fails, or answers could not be checked. Steps that no time is left for are named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.answers import check_ahead, check_families, check_gptq, check_passes
from benchmarks.gpu_check.ops import check_ops
from benchmarks.gpu_check.run import Run, WrongAnswerError
from benchmarks.gpu_check.times import SHAPES, ceilings, time_attention, time_candidates, time_linears, time_shape

ANSWERS = {"ops", "gptq", "families", "passes", "ahead"}


def table(found: dict[str, Any]) -> Iterator[str]:
    """Markdown of what was found."""
    steps = found["steps"]
    if "ops" in steps:
        yield f"Right: {sum(steps['ops'].values())} cases of {len(steps['ops'])} ops."
    if "gptq" in steps:
        yield f"GPTQ's loops: {steps['gptq']} cases right."
    if "ahead" in steps:
        yield f"Decoded ahead of the host: {steps['ahead']} calls, the tokens of decoding one by one."
    if "families" in steps:
        cosines = ", ".join(f"{name} {value:.4f}" for name, value in steps["families"].items())
        yield f"Least cosine of int4 logits, prefilled and decoded: {cosines}."
    if "passes" in steps:
        yield "Passes, least cosine with the model before:\n\n| family, pass | |\n|---|---|"
        yield from (f"| {name} | {said} |" for name, said in steps["passes"].items())
    if "ceilings" in steps:
        peak = steps["ceilings"]
        yield f"Ceilings: {peak['read_bytes_s'] / 1e12:.2f} TB/s read, {peak['bf16_flops_s'] / 1e12:.0f} TFLOP/s in bfloat16."
    for name in ("linears", "attention", "candidates"):
        if rows := steps.get(name):
            heads = list(dict.fromkeys(key for row in rows for key in row))
            yield "\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|"
            yield from ("| " + " | ".join(_cell(row.get(key)) for key in heads) + " |" for row in rows)
    for shape in SHAPES:
        if shape in steps:
            yield f"\n{shape}, int4: " + ", ".join(f"{key} {value:.3f}" for key, value in steps[shape].items())
    if found["left_out"]:
        yield "\nNo time was left for: " + ", ".join(found["left_out"])
    yield from (f"\n**Failed, {name}: {error}**" for name, error in found.get("failed", {}).items())
    if "wrong" in found:
        yield f"\n**Wrong: {found['wrong']}**"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def check(run: Run) -> bool:
    """All steps; False where an answer is wrong, a step fails, or answers could not be checked."""
    try:
        run.step("ops", 0, check_ops)
        run.step("gptq", 0, check_gptq)
        run.step("families", 20, check_families)
        run.step("passes", 20, check_passes)
        run.step("ahead", 5, check_ahead)
    except WrongAnswerError as error:
        run.found["wrong"] = str(error)
        return False
    if run.interpret or not set(run.found["steps"]) >= ANSWERS:
        return set(run.found["steps"]) >= ANSWERS
    run.step("ceilings", 20, ceilings)
    if "ceilings" in run.found["steps"]:
        run.step("linears", 40, time_linears)
        run.step("attention", 30, time_attention)
        run.step("candidates", 20, time_candidates)
    for shape in () if run.quick else SHAPES:
        run.step(shape, 110, time_shape(shape))
    return "failed" not in run.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes: small cases, one linear, no whole model")
    parser.add_argument("--seconds", type=float, help="time to use (540; quick: 110)")
    parser.add_argument("--interpret", action="store_true", help="without a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported
    elif not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device; --interpret runs the small cases without one")
    from llmopt.measure import environment

    command = "python -m benchmarks.gpu_check" + " --quick" * args.quick + " --interpret" * args.interpret
    name = "Triton's interpreter" if args.interpret else torch.cuda.get_device_name()
    about = {"environment": environment.capture(), "command": command, "device": name}

    def text(found: dict[str, Any]) -> str:
        return "\n".join([f"# GPU check, {name}\n\n    {command}\n", *table(found)])

    def write(found: dict[str, Any]) -> None:
        if args.markdown:
            args.markdown.write_text(text(found) + "\n")
        if args.json:
            args.json.write_text(json.dumps({**about, **found}, indent=1) + "\n")

    seconds = args.seconds or (110 if args.quick else 540)
    run = Run(interpret=args.interpret, quick=args.quick, seconds=seconds, written=write)
    right = check(run)
    write(run.found)
    print(text(run.found))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
