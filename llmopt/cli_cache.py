"""``llmopt cache``: the compiled libraries kept on disk."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List or remove the compiled libraries that compile_tvm keeps."
)


@app.command("list")
def show() -> None:
    """Every entry: its key, size, number of parts and kernels; or why it would not be loaded.

    \b
    Examples:
      llmopt cache list
    """
    from llmopt.measure import format as fmt
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
    typer.echo(f"{cache.folder}", err=True)


@app.command()
def clear() -> None:
    """Remove all of them; they are built again when needed.

    \b
    Examples:
      llmopt cache clear
    """
    from llmopt.passes.compile_tvm.cache import Cache

    count = Cache().clear()
    typer.echo(f"removed {count} {'entry' if count == 1 else 'entries'}")
