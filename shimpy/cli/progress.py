"""Progress in bytes: a bar on a terminal, nothing where nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

import click

from shimpy.cli.output import hint


class BytesProgress(Protocol):
    """Shows how far things are."""

    def show(self, what: str, completed: int, total: int) -> None:
        """Show that of `what`, `completed` of `total` bytes are done."""

    def say(self, text: str) -> None:
        """Print a line on standard error, above the bars."""

    def tell(self, text: str) -> None:
        """Print a line of data on standard output, above the bars where they share a terminal."""


class _Silent:
    def show(self, what: str, completed: int, total: int) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Print a line."""
        hint(text)

    def tell(self, text: str) -> None:
        """Print a line of data."""
        click.echo(text)


@contextlib.contextmanager
def bytes_progress() -> Iterator[BytesProgress]:
    """Show progress on standard error as long as the block runs, one bar for each thing."""
    if not sys.stderr.isatty():
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class Bars:
        """A bar for each thing that was named."""

        def __init__(self, progress: Progress) -> None:
            self._progress = progress
            self._tasks: dict[str, TaskID] = {}

        def show(self, what: str, completed: int, total: int) -> None:
            """Move its bar."""
            if what not in self._tasks:
                self._tasks[what] = self._progress.add_task(what, total=total)
            self._progress.update(self._tasks[what], completed=completed, total=total)

        def say(self, text: str) -> None:
            """Print a line; the bars move down."""
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        def tell(self, text: str) -> None:
            """Print a line of data."""
            if sys.stdout.isatty():
                self.say(text)
            else:
                click.echo(text)

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # Data that is piped must not be taken for a line above the bars.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        yield Bars(progress)
