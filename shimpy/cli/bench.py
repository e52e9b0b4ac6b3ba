"""`shimpy bench`: measure a model in each placement that fits, and let the planner know.

Needs no daemon: it starts workers of its own, one after the other, and stops them. A daemon
that holds models takes memory and processors from what is measured, so it is asked first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shimpy.cli.options import complete_model, config_option, kv_type_option, parse_size
from shimpy.units import format_bytes

if TYPE_CHECKING:
    from shimpy.bench.report import Report
    from shimpy.bench.results import Effort
    from shimpy.config import Config
    from shimpy.placement.hardware import Hardware


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


def _check_folder(_ctx: click.Context, _param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file whose folder is none, before anything is measured for it."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {value.parent}")
    return value


@click.command(name="bench")
@click.argument("model", shell_complete=complete_model)
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
    callback=parse_size,
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
@click.option("--n-ctx", type=click.IntRange(1), metavar="N", help="Context in tokens.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of the worker.")
@kv_type_option
@click.option(
    "--json",
    "json_file",
    callback=_check_folder,
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write all samples as JSON; - is standard output, in place of the tables.",
)
@click.option(
    "--plot",
    "plot_file",
    callback=_check_folder,
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
    from shimpy.cli.holders import make_room
    from shimpy.cli.plan import find_hardware, find_model, plan_options
    from shimpy.cli.sweep import Sweep
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
    make_room(unload=unload)
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
    sweep = Sweep(bench, selection)
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
