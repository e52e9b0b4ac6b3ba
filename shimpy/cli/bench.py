"""`shimpy bench`: measure a model in each placement that fits, and let the planner know.

Needs no daemon: it starts workers of its own, one after the other, and stops them. A daemon
that holds models takes memory and processors from what is measured, so it is asked first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import click

from shimpy.cli.options import config_option
from shimpy.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from shimpy.bench.candidates import Selection
    from shimpy.bench.measure import Bench
    from shimpy.bench.report import Report
    from shimpy.bench.results import Effort, Measurement
    from shimpy.client import Client
    from shimpy.config import Config
    from shimpy.placement.hardware import Hardware

_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_UNLOAD_S = 30.0
_POLL_S = 0.1


def _parse_counts(least: int) -> Any:
    """Return a callback that reads "0,4,8"."""

    def parse(
        _ctx: click.Context, _param: click.Parameter, value: str | None
    ) -> tuple[int, ...] | None:
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and int(part) >= least for part in parts):
            raise click.BadParameter(
                f'"{value}" is no list of numbers from {least} on, like 1,4,16'
            )
        return tuple(dict.fromkeys(int(part) for part in parts))

    return parse


def _parse_size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(name="bench")
@click.argument("model")
@click.option(
    "--n-cpu-moe",
    callback=_parse_counts(0),
    metavar="N,N",
    help="Measure with the experts of the first N layers in RAM, for each N.",
)
@click.option(
    "--n-gpu-layers",
    callback=_parse_counts(0),
    metavar="N,N",
    help="Measure with N layers on the GPU, for each N; the output layer counts as one.",
)
@click.option("--all", "every", is_flag=True, help="Measure every placement that fits.")
@click.option(
    "--budget",
    callback=_parse_size,
    metavar="SIZE",
    help="Suppose cards with no more free VRAM than this.",
)
@click.option(
    "--streams",
    callback=_parse_counts(1),
    metavar="N,N",
    help="Requests at once; 1,4,16, on the CPU alone 1,4.",
)
@click.option("--prompt", type=click.IntRange(1), metavar="N", help="Tokens of a prompt.")
@click.option(
    "--predict", type=click.IntRange(2), metavar="N", help="Tokens to generate for each prompt."
)
@click.option("--repeat", type=click.IntRange(1), metavar="N", help="Repetitions of each run.")
@click.option("--n-ctx", type=click.IntRange(1), metavar="N", help="Context of all slots together.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of the worker.")
@click.option("--kv-type", type=click.Choice(_KV_TYPES), help="Type of the KV cache.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write all samples as JSON; - is standard output, in place of the tables.",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw speed against VRAM as a PNG; needs shimpy[bench].",
)
@click.option("--unload", is_flag=True, help="Unload what a running daemon holds, unasked.")
@click.option("--no-keep", is_flag=True, help="Do not keep the speeds for the planner.")
@config_option
def command(
    *,
    model: str,
    n_cpu_moe: tuple[int, ...] | None,
    n_gpu_layers: tuple[int, ...] | None,
    every: bool,
    budget: int | None,
    streams: tuple[int, ...] | None,
    prompt: int | None,
    predict: int | None,
    repeat: int | None,
    n_ctx: int | None,
    threads: int | None,
    kv_type: Any,
    json_file: Path | None,
    plot_file: Path | None,
    unload: bool,
    no_keep: bool,
    config_file: Path | None,
) -> None:
    """Measure how fast MODEL, a name or a .gguf file, is in each placement that fits.

    With a GPU: all on it, the experts of more and more layers in RAM, all of them; on the CPU
    alone: threads, attention and micro-batch. The best, marked *, is what answers a prompt of
    512 tokens with 256 soonest. The planner uses what was measured.
    """
    from shimpy.bench.candidates import Wanted, limit_vram, select_candidates
    from shimpy.bench.measure import Bench
    from shimpy.bench.plot import check_can_plot
    from shimpy.bench.readings import Readings
    from shimpy.bench.report import Report
    from shimpy.cli.plan import find_hardware, find_model, plan_options
    from shimpy.config import load_config
    from shimpy.errors import WorkerError
    from shimpy.logs import setup_logging
    from shimpy.placement.speeds import machine_name
    from shimpy.scheduler.simulations import FILE_NAME, Simulations
    from shimpy.scheduler.worker import Deadlines

    if plot_file is not None:
        check_can_plot()
    config = load_config(file=config_file).config
    setup_logging("error", config.log_format)
    _, found = find_model(model, config)
    assert found.shape is not None, "find_model returns only models that can be used"
    if found.shape.is_embedding or found.shape.is_reranker:
        raise click.UsageError(f"{found.name} computes embeddings; bench measures generation")
    _make_room(unload=unload)
    hardware = limit_vram(find_hardware(config, vram=(), ram=None), budget)
    effort = _effort(streams, prompt, predict, repeat, has_gpu=bool(hardware.gpus))
    options = plan_options(
        config, n_ctx=n_ctx or effort.n_ctx, n_slots=effort.n_slots, cpu_moe="auto", kv_type=kv_type
    )
    wanted = Wanted(
        n_cpu_moe=n_cpu_moe or (),
        n_gpu_layers=n_gpu_layers or (),
        every=every,
        n_threads=threads,
        usual_threads=config.n_threads,
    )
    # It is told no speeds: what was measured before is measured again.
    simulations = Simulations(config.state_dir / FILE_NAME)
    plan = partial(simulations.plan, found.shape)
    if hardware.gpus:
        plan = partial(simulations.plan_exactly, found)
    selection = select_candidates(plan, hardware, options, wanted, shape=found.shape)
    bench = Bench(
        model=found,
        effort=effort,
        readings=Readings(hardware.gpus),
        deadlines=Deadlines(load_s=config.load_timeout, silence_s=config.hang_timeout),
    )
    sweep = _Sweep(bench, selection)
    sweep.run()
    report = Report(
        model=found,
        machine=machine_name(hardware),
        effort=effort,
        budget_bytes=budget,
        measurements=tuple(sweep.measurements),
        left_out=(*selection.left_out, *sweep.failures),
    )
    if report.measurements and not no_keep:
        _keep(config, report, hardware)
    _show(report, json_file, plot_file)
    if sweep.was_interrupted:
        raise click.Abort
    if not report.measurements:
        raise WorkerError("nothing could be measured: " + "; ".join(report.left_out))


def _effort(
    streams: tuple[int, ...] | None,
    n_prompt: int | None,
    n_generated: int | None,
    n_repetitions: int | None,
    *,
    has_gpu: bool,
) -> Effort:
    from shimpy.bench.results import CPU_EFFORT, GPU_EFFORT, Effort

    usual = GPU_EFFORT if has_gpu else CPU_EFFORT
    return Effort(
        n_prompt=n_prompt or usual.n_prompt,
        n_generated=n_generated or usual.n_generated,
        streams=streams or usual.streams,
        n_repetitions=n_repetitions or usual.n_repetitions,
    )


# --- a daemon that holds models ---------------------------------------------------------------


def _make_room(*, unload: bool) -> None:
    """Say what a daemon on this machine holds, and have it unloaded where that is wanted."""
    from shimpy.cli.output import hint, waiting
    from shimpy.client import Client
    from shimpy.config import client_url
    from shimpy.errors import DaemonError, UnreachableError

    url = client_url()
    if not _is_local(url):
        return
    with Client(url) as client:
        try:
            names = [model["name"] for model in client.ps()["models"]]
        except UnreachableError:
            return
        except DaemonError as error:
            hint(f"the daemon at {url} does not tell what it holds: {error.message}")
            return
        if not names:
            return
        hint(
            f"The daemon at {url} holds {', '.join(names)}: its memory is not free to measure in, "
            "and its requests would slow what is measured."
        )
        if not unload and not _agrees():
            hint("It keeps them. `shimpy bench --unload` has them unloaded first.")
            return
        for name in names:
            client.unload(name)
        with waiting("waiting for requests to end"):
            _wait_unloaded(client)


def _is_local(url: str) -> bool:
    """Whether a daemon's address is on this machine."""
    return url.startswith("unix:") or urlsplit(url).hostname in _LOOPBACK


def _agrees() -> bool:
    """Ask on a terminal whether to unload; elsewhere nobody is there to agree."""
    return sys.stdin.isatty() and click.confirm("Unload them first?", default=True, err=True)


def _wait_unloaded(client: Client) -> None:
    """Wait until the daemon holds nothing.

    Raises:
        DaemonError: requests keep a model loaded.
    """
    from shimpy.errors import DaemonError

    deadline = time.monotonic() + _UNLOAD_S
    while held := [model["name"] for model in client.ps()["models"]]:
        if time.monotonic() > deadline:
            raise DaemonError(
                f"{', '.join(held)} is still in use after {_UNLOAD_S:.0f} s; stop its requests, "
                "or the daemon"
            )
        time.sleep(_POLL_S)


# --- the sweep --------------------------------------------------------------------------------


class _Sweep:
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
        from dataclasses import replace

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
                decode = measurement.decode_per_s.median
                progress.say(f"{title}: {decode:.3g} tok/s")
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


# --- what came of it --------------------------------------------------------------------------


def _keep(config: Config, report: Report, hardware: Hardware) -> None:
    from shimpy.bench.keep import keep_speeds
    from shimpy.cli.output import hint
    from shimpy.errors import ShimpyError
    from shimpy.placement.speeds import FOLDER

    folder = config.state_dir / FOLDER
    try:
        n_kept = keep_speeds(folder, report.model, hardware, report.measurements)
    except ShimpyError as error:
        # The figures are there all the same.
        hint(f"the speeds can't be kept for the planner: {error.message}")
        return
    if n_kept:
        hint(f"{n_kept} speeds are kept in {folder}; plans of this model use them")


def _show(report: Report, json_file: Path | None, plot_file: Path | None) -> None:
    """Print the tables, and write the files that were asked for."""
    import json

    from shimpy.bench.plot import plot_report
    from shimpy.bench.report import report_to_json
    from shimpy.cli.output import print_json

    if json_file is not None and str(json_file) == "-":
        print_json(report_to_json(report))
    elif report.measurements:
        _print_tables(report)
    with _explained(json_file):
        if json_file is not None and str(json_file) != "-":
            text = json.dumps(report_to_json(report), indent=1) + "\n"
            json_file.write_text(text, encoding="utf-8")
    with _explained(plot_file):
        if plot_file is not None and report.measurements:
            plot_report(report, plot_file)


@contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.FileError(str(path), error.strerror or str(error)) from error


def _print_tables(report: Report) -> None:
    from shimpy.bench.report import (
        memory_headers,
        memory_rows,
        placement_headers,
        placement_rows,
    )
    from shimpy.cli.output import print_table

    click.echo(_title(report))
    print_table(placement_headers(report), placement_rows(report))
    click.echo()
    print_table(memory_headers(report), memory_rows(report))
    for reason in report.left_out:
        click.echo(f"left out: {reason}")
    best = report.best
    if best is not None and not best.candidate.is_usual:
        click.echo(f"n_threads = {best.candidate.n_threads} in the config makes it the daemon's")


def _title(report: Report) -> str:
    effort = report.effort
    text = (
        f"{report.model.name} on {report.machine}\n"
        f"prompts of {effort.n_prompt} tokens, {effort.n_generated} generated, medians of "
        f"{effort.n_repetitions} with their deviations"
    )
    if report.budget_bytes is not None:
        text += f"; no more than {format_bytes(report.budget_bytes)} VRAM"
    return text + "\n"
