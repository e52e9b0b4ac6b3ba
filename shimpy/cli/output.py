"""What commands print: data on stdout, as a table for people or as JSON; the rest on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """Print data as JSON, indented."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headers; never wrapped or coloured when piped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for header in headers:
        table.add_column(header, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*row)
    # Wide enough for every cell: a table that is cut is of no use to grep.
    console = Console(width=None if sys.stdout.isatty() else 10_000, soft_wrap=True)
    console.print(table, crop=False)


def hint(text: str) -> None:
    """Tell the user something that is no data."""
    click.echo(text, err=True)
