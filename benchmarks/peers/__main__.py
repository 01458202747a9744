"""llmopt beside its peers on one machine: same shapes, same threads, interleaved rounds, one table.

    python -m benchmarks.peers [--shape qwen3-0.6b] [--peers llama-cpp-q4_0,openvino-int4] [--rounds 5]
    make peers ARGS="--rounds 9" IK_BENCH=path/to/llama-bench

Every peer gets an environment of its own under --cache, once; what cannot run is in the table with its reason. Weights
are random: speed only. A cell is a request of that depth, "8x128" eight of them together; decode is without the prompt.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import contenders, jobs, model_files, tables
from benchmarks.peers.contenders import FIELD, OURS, Setup, Timed
from benchmarks.peers.record import Record, Row
from benchmarks.peers.rounds import Outcome, Plan, Rounds
from benchmarks.peers.worker import ContenderError
from llmopt.measure import environment
from llmopt.measure.ceilings import CeilingMeter, usable_meter
from llmopt.models import published
from llmopt.models.published import SHAPES
from llmopt.passes.fuse_kernels import KV_DTYPES

ROOT = Path(__file__).resolve().parents[2]
# of this machine alone: they say nothing about the result
_LEFT_OUT = ("--cache", "--lock", "--json", "--markdown")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = f"{', '.join(SHAPES)}, or NAME@LAYERS: its first so many"
    parser.add_argument("--shape", default="qwen3-0.6b", help=shapes)
    parser.add_argument("--peers", default="all", help=f"comma-separated, of {', '.join(FIELD)}; llmopt always runs")
    parser.add_argument("--isa", default="", help="of ours: portable, avx2, avx512 or amx")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", default=jobs.DEFAULT_JOBS, help="DEPTH or SEQUENCESxDEPTH, comma-separated")
    parser.add_argument(
        "--tokens", type=int, default=32, help="to decode per request; half of it for several sequences"
    )
    parser.add_argument("--threads", type=int, default=environment.visible_cores())
    parser.add_argument("--passes", default="", help="of ours, comma-separated; default: all")
    parser.add_argument("--kv-dtype", default="", choices=["", *KV_DTYPES], help="of our cache; default: the model's")
    parser.add_argument("--cap-s", type=float, default=60.0, help="a request that takes longer is skipped")
    parser.add_argument(
        "--one-at-a-time", action=argparse.BooleanOptionalAction, help="one model in memory at a time; default for MoE"
    )
    parser.add_argument("--ik-bench", type=Path, help="llama-bench of an ik_llama.cpp that you have built")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "peers", help="environments and model files")
    parser.add_argument("--lock", type=Path, help="a file locked while something is timed, for shared machines")
    parser.add_argument("--json", type=Path, help="write the record")
    parser.add_argument("--markdown", type=Path, help="write the table")
    args = parser.parse_args(words)
    args.names = contenders.usual() if args.peers == "all" else [name for name in args.peers.split(",") if name]
    unknown = [name for name in args.names if name not in FIELD]
    if unknown:
        parser.error(f"--peers: expected some of {', '.join(FIELD)}, got {unknown[0]!r}")
    try:
        if args.shape != contenders.SMALL:
            published.find(args.shape)
    except KeyError:
        parser.error(f"--shape: expected {contenders.SMALL} or {shapes}; got {args.shape!r}")
    if args.kv_dtype and "fuse_kernels" not in (args.passes or "fuse_kernels"):
        parser.error("--kv-dtype: expected fuse_kernels among --passes")
    if args.rounds < 1 or args.threads < 1 or args.tokens < 1:
        parser.error("--rounds, --threads, --tokens: expected 1 or more")
    try:
        args.jobs = jobs.parse(args.cells, args.tokens)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    setup = Setup(
        args.shape,
        args.jobs,
        args.threads,
        args.cache.resolve(),
        say,
        passes=args.passes,
        isa=args.isa,
        kv_dtype=args.kv_dtype,
        ik_bench=args.ik_bench,
    )
    args.names = list(dict.fromkeys([OURS, *args.names]))
    field, refused = make_field(args.names, setup)
    if args.one_at_a_time is None:
        args.one_at_a_time = args.shape != contenders.SMALL and model_files.is_moe(args.shape)
    plan = Plan(args.jobs, args.rounds, args.cap_s, args.one_at_a_time, args.lock)
    ran = command(sys.argv[1:] if words is None else words)
    meter = ceiling_meter(args.threads)

    def written(outcome: Outcome) -> Record:
        """The record so far. After every round, so that an interrupt costs one round and not the run."""
        record = make_record(args, ran, outcome, refused, dict(meter.samples) if meter else {})
        if args.json:
            record.to_json(args.json)
        if args.markdown:
            args.markdown.write_text(tables.markdown(record), encoding="utf-8")
        return record

    def every_round() -> None:
        if meter is None:
            return
        for _ in range(3 if args.one_at_a_time else 1):
            meter.measure_round()
        if args.one_at_a_time:  # the largest models leave no room for its buffer
            meter.close()

    with meter or CeilingMeter():
        outcome = Rounds(field, plan, every_round, say, on_round=written).run()
    tables.print_table(written(outcome))
    return 0 if OURS in outcome.samples else 1


def make_record(
    args: argparse.Namespace, ran: str, outcome: Outcome, refused: Mapping[str, str], measured: dict[Any, list[float]]
) -> Record:
    """What the run says of itself.

    Args:
        args: of the command.
        ran: the command, as it is shown.
        outcome: of the rounds done.
        refused: contenders that could not be set up, and why.
        measured: ceilings, by kind.
    """
    cells = [cell for job in args.jobs for cell in job.cells]
    settings = {"threads": args.threads, "rounds": outcome.rounds, "cap_s": args.cap_s, "tokens": args.tokens,
                "passes": args.passes or "all", "isa": args.isa or "auto", "kv_dtype": args.kv_dtype or "auto",
                "one_at_a_time": args.one_at_a_time}  # fmt: skip
    return Record(
        shape=args.shape, command=ran, settings=settings, environment=environment.capture(),
        cells=sorted(cells, key=lambda cell: (cell.startswith("decode"), "x" in cell)),
        rows=[Row(name, FIELD[name].label, FIELD[name].is_peer, outcome.info.get(name, {})) for name in args.names],
        samples=outcome.samples, ceilings=measured,
        skipped={name: dict.fromkeys(cells, reason) for name, reason in refused.items()} | outcome.skipped,
    )  # fmt: skip


def make_field(names: Sequence[str], setup: Setup) -> tuple[dict[str, Timed], dict[str, str]]:
    """Contenders made ready, and why the others are not."""
    field: dict[str, Timed] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            field[name] = contenders.make(name, setup)
        except ContenderError as error:
            say(f"{name}: {error}")
            refused[name] = str(error)
    return field, refused


def ceiling_meter(threads: int) -> CeilingMeter | None:
    import torch

    torch.set_num_threads(threads)
    return usable_meter()


def command(words: Sequence[str]) -> str:
    """What was run, without the folders of this machine."""
    kept: list[str] = []
    pairs = iter(word for part in words for word in part.split("=", 1))
    for word in pairs:
        if word in _LEFT_OUT:
            next(pairs, None)
        elif word == "--ik-bench":
            kept += [word, Path(next(pairs, "")).name]
        else:
            kept.append(word)
    return shlex.join(["python", "-m", "benchmarks.peers", *kept])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # so that workers, which sleep in process groups of their own, are ended as after Ctrl-C
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
