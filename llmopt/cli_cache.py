"""``llmopt cache``: the compiled libraries and the schedules found by tuning, kept on disk."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List or remove the libraries and schedules that compile_tvm keeps.",
)


@app.command("list")
def show() -> None:
    """Every library: its key, size, number of parts and kernels; or why it would not be loaded. Every file of schedules.

    \b
    Examples:
      llmopt cache list
    """
    from llmopt.measure import format as fmt
    from llmopt.passes.compile_tvm import records
    from llmopt.passes.compile_tvm.cache import Cache

    cache = Cache()
    for entry in cache.entries():
        if isinstance(entry, str):
            typer.echo(f"refused  {entry}")
            continue
        parts, versions = entry.made_from.get("parts", []), entry.made_from.get("versions", {})
        typer.echo(
            f"{entry.key}  {fmt.size(entry.num_bytes)}  {len(parts)} parts, {len(entry.kernels)} kernels, "
            f"{entry.made_from.get('isa')}, apache-tvm {versions.get('apache-tvm')}"
        )
    for file in records.files():
        typer.echo(f"{file.stem}  {fmt.size(file.stat().st_size)}  {records.described(file)}")
    typer.echo(f"{cache.folder.parent}", err=True)


@app.command()
def clear(
    schedules: Annotated[bool, typer.Option("--schedules", help="Also the schedules that tuning has found.")] = False,
) -> None:
    """Remove all libraries; they are built again when needed.

    \b
    Examples:
      llmopt cache clear
    """
    from llmopt.passes.compile_tvm import records
    from llmopt.passes.compile_tvm.cache import Cache

    count = Cache().clear()
    typer.echo(f"removed {count} {'entry' if count == 1 else 'entries'}")
    files = records.files()
    for file in files if schedules else []:
        file.unlink()
    if files:
        typer.echo(
            f"{'removed' if schedules else 'kept'} {len(files)} file{'' if len(files) == 1 else 's'} of schedules"
        )
