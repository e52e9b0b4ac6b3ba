"""What commands print: data on stdout, as a table for people or as JSON; the rest on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import click

T = TypeVar("T")


def print_json(value: Any) -> None:
    """Print data as JSON, indented."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, gap: int = 3) -> None:
    """Print rows under headers, `gap` spaces apart; never wrapped or coloured when piped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for header in headers:
        table.add_column(header, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*row)
    # Wide enough for every cell: a table that is cut is of no use to grep.
    console = Console(width=None if sys.stdout.isatty() else 10_000, soft_wrap=True)
    console.print(table, crop=False)


def wrapped(line: str) -> str:
    """Return a line broken between words where the terminal ends; whole when piped."""
    import shutil
    import textwrap

    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False)


def hint(text: str) -> None:
    """Tell the user something that is no data."""
    click.echo(text, err=True)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on a terminal what is waited for, as long as the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def wait_for_first(items: Iterator[T], what: str) -> Iterator[T]:
    """Yield the items; until the first is there, say on a terminal what is waited for."""
    with waiting(what):
        first = next(items, None)
    if first is not None:
        yield first
        yield from items
