"""The ``llmopt`` command. Works on local files only, runs no code from a checkpoint, and fetches nothing.

Exit codes: 0 done; 1 the work failed; 2 bad usage or bad input, nothing was changed; 130 interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from llmopt import cli_cache, cli_passes
from llmopt.errors import CheckpointError, InputError, LlmoptError

if TYPE_CHECKING:
    from llmopt.measure.report import Report

_DONE, _FAILED, _BAD_INPUT, _INTERRUPTED = 0, 1, 2, 130


class _Group(TyperGroup):
    """Turns what llmopt raises into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LlmoptError, OSError, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                raise
            if isinstance(error, KeyboardInterrupt):
                code, text = _INTERRUPTED, "interrupted"
            else:
                code = _BAD_INPUT if isinstance(error, InputError | CheckpointError) else _FAILED
                text = str(error)
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(code) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make Hugging Face causal LMs (ERNIE 4.5, DeepSeek, Qwen3) fast, and measure what each optimization gained.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 bad usage or input, 130 interrupted.",
)

app.add_typer(cli_cache.app, name="cache")
app.command()(cli_passes.passes)

_Passes = Annotated[
    str | None,
    typer.Option(
        "--passes",
        metavar="A,B",
        help="Only these passes (`llmopt passes`). Default: all that apply.",
    ),
]
_Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PASS.OPTION=VALUE",
        help="Set an option (`llmopt passes`), e.g. quantize_gptq.group_size=64.",
    ),
]
_Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="FILE", help="Text, or .json list of texts or token-id lists, for quantization."
    ),
]
_Measure = Annotated[
    bool,
    typer.Option("--measure/--no-measure", help="Time and verify each pass; undo what is slower or out of budget."),
]
_Full = Annotated[bool, typer.Option("--measure-full", help="Measure leave-one-out gains too.")]
_Budget = Annotated[
    float | None,
    typer.Option("--quality-budget", metavar="KL", help="Undo a pass whose mean KL from the baseline is above this."),
]
_Strict = Annotated[bool, typer.Option("--strict", help="Fail when a pass does not apply or is undone.")]
_Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the record as JSON; '-' prints nothing else on stdout."),
]
_Seed = Annotated[
    int, typer.Option("--seed", help="Of what is drawn: calibration rows, random prompts, inputs, bootstrap.")
]
_Model = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="A local checkpoint.")]
_Shape = Annotated[
    str | None, typer.Option("--shape", metavar="NAME", help="A published shape with random weights, e.g. qwen3-0.6b.")
]
_Layers = Annotated[int | None, typer.Option("--layers", help="Only the first layers of a shape.")]
_ReportDir = Annotated[
    Path | None, typer.Option("--report-dir", metavar="DIR", help="Write report.json, report.md and report.png there.")
]
_Isolated = Annotated[
    bool, typer.Option("--isolated-memory", help="Peak memory before and after, each in a process of its own.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        import llmopt

        typer.echo(f"llmopt {llmopt.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; the help text is the app's."""


@app.command()
def optimize(
    *,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint: config.json and safetensors.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Where to write the optimized checkpoint.")],
    passes: _Passes = None,
    options: _Options = None,
    calibration: _Calibration = None,
    measure: _Measure = True,
    measure_full: _Full = False,
    quality_budget: _Budget = None,
    strict: _Strict = False,
    checkpoint_format: Annotated[
        str,
        typer.Option(
            "--checkpoint-format",
            metavar="NAME",
            help="gptq (v1, read most widely) | gptq_v2 (zero points as they are; v1 has no word for 0).",
        ),
    ] = "gptq",
    json: _Json = None,
    seed: _Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
) -> None:
    """Optimize a checkpoint, print the receipt, and save the result.

    \b
    Examples:
      llmopt optimize models/qwen3 -o out
      llmopt optimize models/qwen3 -o out --calibration my.txt --json report.json
      llmopt optimize models/qwen3 -o out --set quantize_gptq.sym=false --checkpoint-format gptq_v2
      llmopt optimize models/qwen3 -o out --passes quantize_gptq \\
             --set quantize_gptq.group_size=64 --quality-budget 0.05
    """
    import llmopt
    from llmopt import cli_models, cli_output
    from llmopt.checkpoint.quant_config import check_format

    cli_models.read_config(directory)
    _check_out(directory, out, overwrite=overwrite)
    check_format("--checkpoint-format", checkpoint_format)
    settings = cli_models.settings(
        passes, options, calibration, measure=_level(measure, measure_full), quality_budget=quality_budget, seed=seed
    )
    opened = cli_models.open_model(directory, passes=None)
    with cli_output.progress() as on_event:
        model = llmopt.optimize(opened.model, tokenizer=opened.tokenizer, strict=strict, on_event=on_event, **settings)
    # first of all the receipt: a full disk must not lose it
    report = llmopt.report(model)
    _show(report.to_dict(), json, report.print)
    llmopt.save(model, out, tokenizer=opened.tokenizer, checkpoint_format=cast(Any, checkpoint_format))
    typer.echo(f"saved to {out}", err=True)


@app.command()
def bench(
    *,
    model: _Model = None,
    shape: _Shape = None,
    layers: _Layers = None,
    passes: _Passes = None,
    options: _Options = None,
    calibration: _Calibration = None,
    measure_full: _Full = False,
    quality_budget: _Budget = None,
    report_dir: _ReportDir = None,
    json: _Json = None,
    seed: _Seed = 0,
    isolated_memory: _Isolated = False,
) -> None:
    """Optimize in memory and print the receipt; nothing is saved but reports.

    \b
    Examples:
      llmopt bench --shape qwen3-0.6b
      llmopt bench --model models/qwen3 --report-dir reports --isolated-memory
    """
    import llmopt
    from llmopt import cli_models, cli_output
    from llmopt.bench import bench_shape, with_rivals

    if model is None and isolated_memory:
        raise InputError("bench: --isolated-memory loads checkpoints: expected --model DIR, got --shape")
    settings = cli_models.settings(
        passes, options, calibration, measure=_level(True, measure_full), quality_budget=quality_budget, seed=seed,
        rivals=True,
    )  # fmt: skip
    if (model is None) == (shape is None) or (model is not None and layers is not None):
        raise InputError("bench: expected either --model DIR, or --shape NAME with or without --layers N")
    subject = cli_models.open_model(model, passes=None).model if model is not None else None
    with cli_output.progress() as on_event:
        if shape is not None:
            report = bench_shape(shape, num_layers=layers, on_event=on_event, **settings)
        else:
            settings["passes"] = with_rivals(settings["passes"])
            report = llmopt.report(llmopt.optimize(subject, on_event=on_event, **settings))
    if model is not None and isolated_memory:
        _measure_isolated(model, subject, report)
    if report_dir is not None:
        _write_reports(report, report_dir)
    _show(report.to_dict(), json, report.print)


@app.command()
def compare(
    *,
    subjects: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Checkpoints, or report.json files.")],
    json: _Json = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the random prompt that models with different tokenizers read.")
    ] = 0,
) -> None:
    """Measure checkpoints side by side: times, share of the machine's bandwidth, and quality against the first.

    They are loaded as they are (plain, saved by llmopt, or GPTQ), held in memory together, and timed in the same
    rounds. report.json files are shown as they were recorded.

    \b
    Examples:
      llmopt compare models/qwen3 out-group64 out-group128
      llmopt compare models/qwen3 out --json comparison.json
      llmopt compare monday/report.json friday/report.json
    """
    from llmopt import cli_models, cli_output
    from llmopt.measure import views

    if len(subjects) < 2:
        raise InputError.argument("compare", expected="at least two checkpoints or reports", got=len(subjects))
    files = [path for path in subjects if path.is_file()]
    if files and len(files) < len(subjects):
        other = next(path for path in subjects if path not in files)
        raise InputError(
            f"compare: expected either checkpoints or report files, got both ({files[0]} is a file, {other} is not)"
        )
    if files:
        reports = [cli_models.read_report(path) for path in files]
        _show([report.to_dict() for report in reports], json, lambda: views.print_compare(reports))
        return
    import llmopt

    models = cli_models.open_models(subjects)
    with cli_output.progress() as on_event:
        comparison = llmopt.compare(models, on_event=on_event, seed=seed)
    _show(comparison.to_dict(), json, comparison.print)


@app.command()
def kernels(
    *,
    op: Annotated[str | None, typer.Argument(metavar="OP", help="One op. Default: all.")] = None,
    isa: Annotated[str | None, typer.Option("--isa", metavar="NAME", help="portable | avx2 | avx512 | amx.")] = None,
    case: Annotated[str | None, typer.Option("--case", metavar="TEXT", help="Cases whose name contains this.")] = None,
    all_cases: Annotated[bool, typer.Option("--all-cases", help="Odd sizes too, not only published models'.")] = False,
    rounds: Annotated[int, typer.Option("--rounds", help="Interleaved rounds a case.")] = 7,
    json: _Json = None,
    seed: _Seed = 0,
) -> None:
    """Microbenchmark of the kernels: correctness first, then time, rate, and fraction of the machine's ceiling.

    \b
    Examples:
      llmopt kernels
      llmopt kernels int4_linear --case t1 --isa avx2 --json int4.json
    """
    from llmopt import cli_output
    from llmopt.measure import kernel_bench
    from llmopt.ops import SPECS

    if op is not None and op not in SPECS:
        raise InputError.argument("op", expected=" | ".join(SPECS), got=op)
    cases = list(kernel_bench.select([SPECS[op]] if op else SPECS.values(), case=case, all_cases=all_cases))
    if not cases:
        raise InputError.argument("case", expected="part of a case's name (see --all-cases)", got=case)
    if isa is not None:
        _force_isa(isa)
    table = cli_output.KernelTable() if json != cli_output.STDOUT else None
    result = kernel_bench.run(cases, rounds=rounds, seed=seed, on_result=table.add if table else None)
    if table is not None:
        table.finish(result)
    if json is not None:
        cli_output.write_json(result.to_dict(), json)
    if any(each.wrong is not None for each in result.results):
        raise typer.Exit(_FAILED)


@app.command()
def doctor(json: _Json = None) -> None:
    """Say what will run on this machine, what will not, and why. Exit code 0 if llmopt is usable.

    \b
    Examples:
      llmopt doctor
      llmopt doctor --json -
    """
    from llmopt import cli_doctor, cli_output

    checks = []
    for check in cli_doctor.run_checks():
        checks.append(check)
        if json != cli_output.STDOUT:
            hint = f"  ({check.hint})" if check.hint else ""
            typer.echo(f"{check.status:<5} {check.name:<22} {check.detail}{hint}")
    if json is not None:
        cli_output.write_json(cli_doctor.to_json(checks), json)
    if not cli_doctor.usable(checks):
        raise typer.Exit(_FAILED)


def _force_isa(name: str) -> None:
    from llmopt import native

    try:
        native.force_isa(name)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def _level(measure: bool, full: bool) -> bool | str:
    if full and not measure:
        raise InputError("measure: expected one of --no-measure and --measure-full, got both")
    return "full" if full else measure


def _check_out(directory: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse a bad target before hours of work rather than after."""
    if out.resolve() == directory.resolve():
        raise InputError.argument("--out", expected="another directory than the input", got=str(out))
    if out.is_file():
        raise InputError.argument("--out", expected="a directory", got=f"{out} (a file)")
    parent = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise InputError.argument("--out", expected="a place that can be written to", got=str(out))
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"--out: {out} is not empty; --overwrite replaces it")


def _measure_isolated(directory: Path, model: Any, report: Report) -> None:
    """Fill the peak memory of the baseline and of the result, each from a process of its own."""
    import tempfile

    import llmopt
    from llmopt.measure import memory, summary

    before, after = report.baseline_memory, summary.final_memory(report)
    try:
        if before is not None:
            measured = memory.measure_isolated(directory, implementation="eager")
            before.peak_rss, before.peak_rss_how = measured.peak_rss, measured.how
        if after is not None:
            with tempfile.TemporaryDirectory(prefix="llmopt-") as scratch:
                llmopt.save(model, Path(scratch) / "model")
                measured = memory.measure_isolated(Path(scratch) / "model")
            after.peak_rss, after.peak_rss_how = measured.peak_rss, measured.how
    except memory.MemoryMeasurementError as error:
        # minutes of work are in the receipt by now: keep it, and say what is missing from it
        report.notes.append(f"memory in a process of its own was not measured: {error}")


def _write_reports(report: Report, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    report.to_json(directory / "report.json")
    report.to_markdown(directory / "report.md")
    report.plot(directory / "report.png")


def _show(record: Any, json: Path | None, show: Callable[[], None]) -> None:
    """Write the record where ``--json`` says, and print the view unless that is stdout."""
    from llmopt import cli_output

    if json is not None:
        cli_output.write_json(record, json)
    if json != cli_output.STDOUT:
        show()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
