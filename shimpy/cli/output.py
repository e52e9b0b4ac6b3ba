"""What commands print: data on stdout, as a table for people or as JSON; the rest on stderr."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

T = TypeVar("T")


def print_json(value: Any) -> None:
    """Print data as JSON, indented."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, gap: int = 3) -> None:
    """Print rows under headers, `gap` spaces apart, or one where a terminal is too narrow.

    No cell is ever cut, and nothing is coloured when piped.
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(headers, *rows, strict=True)]
    width = sum(widths) + gap * (len(widths) - 1)
    if sys.stdout.isatty() and width > shutil.get_terminal_size().columns:
        gap = 1
    for number, row in enumerate((headers, *rows)):
        blanks = (width - cell_len(cell) for cell, width in zip(row, widths, strict=True))
        cells = [cell + " " * n for cell, n in zip(row, blanks, strict=True)]
        # No blanks at the end: a terminal just as narrow would show them as an empty line.
        line = (" " * gap).join(cells).rstrip()
        click.echo(line if number else click.style(line, bold=True))


def wrapped(line: str) -> str:
    """Return a line broken between words where the terminal ends; whole when piped."""
    import textwrap

    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False)


def hint(text: str) -> None:
    """Tell the user something that is no data."""
    click.echo(text, err=True)


def read_text(path: Path) -> str:
    """Return the text of a file that the user has named.

    Raises:
        UserError: it can't be read; the message says why.
    """
    from shimpy.errors import UserError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"can't read {path}: it is no text in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error


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
