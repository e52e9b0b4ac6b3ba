"""One placement measured after the other, with progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from shimpy.bench.candidates import Selection
    from shimpy.bench.measure import Bench
    from shimpy.bench.results import Measurement


class Sweep:
    """Measures one candidate after the other; what was measured before a Ctrl-C is kept."""

    def __init__(self, bench: Bench, selection: Selection) -> None:
        self._bench = bench
        self._candidates = selection.candidates
        self.measurements: list[Measurement] = []
        self.failures: list[str] = []
        self.was_interrupted = False

    def run(self) -> None:
        """Measure all; a candidate that fails is left out with its reason."""
        import asyncio

        n_steps = self._bench.effort.n_steps * len(self._candidates)
        with _progress(n_steps) as progress:
            try:
                asyncio.run(self._measure_all(progress))
            except KeyboardInterrupt:
                self.was_interrupted = True

    async def _measure_all(self, progress: _Progress) -> None:
        from msgspec.structs import replace

        from shimpy.bench.report import format_rate
        from shimpy.errors import ShimpyError

        n_all, n_steps = len(self._candidates), self._bench.effort.n_steps
        for number, candidate in enumerate(self._candidates):
            title = f"[{number + 1}/{n_all}] {candidate.label}"
            bench = replace(self._bench, on_step=partial(progress.step, title))
            try:
                measurement = await bench.measure(candidate)
            except ShimpyError as error:
                self.failures.append(f"{candidate.label}: {error.message}")
                progress.say(f"{title}: {error.message}")
            else:
                self.measurements.append(measurement)
                progress.say(f"{title}: {format_rate(measurement.decode_per_s)} tok/s")
            progress.at((number + 1) * n_steps)


class _Progress(Protocol):
    def step(self, title: str, what: str) -> None:
        """Show what is done now of a placement."""

    def at(self, n_done: int) -> None:
        """Show that so many steps are done."""

    def say(self, text: str) -> None:
        """Print a line."""


class _Lines:
    """Progress where nobody watches: a line for each placement."""

    def step(self, title: str, what: str) -> None:
        """Show nothing."""

    def at(self, n_done: int) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Print a line."""
        click.echo(text, err=True)


@contextmanager
def _progress(n_steps: int) -> Iterator[_Progress]:
    """Show progress on standard error as long as the block runs."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    class Bar:
        """One bar for the whole sweep."""

        def __init__(self, progress: Progress) -> None:
            self._progress = progress
            self._task = progress.add_task("", total=n_steps)

        def step(self, title: str, what: str) -> None:
            """Move it on, and say what is done now."""
            self._progress.update(self._task, description=f"{title}: {what}", advance=1)

        def at(self, n_done: int) -> None:
            """Move it to where it is."""
            self._progress.update(self._task, completed=n_done)

        def say(self, text: str) -> None:
            """Print a line above it."""
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress)
