"""``llmopt passes``: what passes there are and what may be set of each, read from their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import typer

from llmopt.errors import InputError

if TYPE_CHECKING:
    from llmopt.passes.base import Pass

_ROLE = re.compile(r":\w+:`[~.]*([^`]+)`|``([^`]+)``")
_OPTION = re.compile(r"^ {4}(\w+): ", re.MULTILINE)
_WIDTH = 100


def passes(name: str | None = typer.Argument(None, metavar="PASS", help="One pass. Default: all.")) -> None:
    """The passes in running order, and their options with defaults: what --passes and --set take.

    \b
    Examples:
      llmopt passes
      llmopt passes fuse_kernels
    """
    from llmopt.passes import PASSES

    if name is not None and name not in PASSES:
        raise InputError.argument("pass", expected=" | ".join(PASSES), got=name)
    typer.echo("\n\n".join("\n".join(described(PASSES[key])) for key in ([name] if name else PASSES)))


def described(kind: type[Pass]) -> Iterator[str]:
    """Lines about one pass."""
    summary, _, _ = (inspect.getdoc(kind) or "").partition("\n\n")
    yield from textwrap.wrap(f"{kind.name}: {summary}", _WIDTH)
    texts = option_texts(kind)
    for field in dataclasses.fields(cast(Any, kind)):
        default = field.default if field.default is not dataclasses.MISSING else cast(Any, field.default_factory)()
        yield f"  {kind.name}.{field.name} = {default!r}"
        yield from textwrap.wrap(texts[field.name], _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def option_texts(kind: type[Pass]) -> dict[str, str]:
    """What the docstring's ``Args`` say, by option."""
    _, _, args = (inspect.getdoc(kind) or "").partition("Args:\n")
    parts = _OPTION.split(args.partition("\n\n")[0])[1:]
    plain = (_ROLE.sub(r"\1\2", " ".join(text.split())) for text in parts[1::2])
    return dict(zip(parts[::2], plain, strict=True))
