"""`shimpy plan`: explain where a model would be placed, without loading anything.

Of a model that a daemon knows, the plan is the daemon's: it knows its flags, and what is set about
the model. Else none is needed: the model's header and a snapshot of the machine, or a supposed one,
are all that a plan is made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shimpy.cli.options import (
    LOAD_MODES,
    complete_model,
    config_option,
    json_option,
    kv_type_option,
    parse_size,
)

if TYPE_CHECKING:
    from shimpy.config import Config
    from shimpy.errors import NotFoundError
    from shimpy.placement.explain import PlanReport
    from shimpy.placement.hardware import Hardware
    from shimpy.placement.placement import CpuMoe, PlanOptions
    from shimpy.registry.model import Model

_CPU_MOE = ("auto", "on", "off")


def _parse_cpu_moe(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Return auto, on, off, or a number of layers."""
    if value is None or value.lower() in _CPU_MOE:
        return value and value.lower()
    if value.isdecimal():
        return int(value)
    raise click.BadParameter(f'"{value}" is none of auto, on, off, or a number of layers')


@click.command(name="plan")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--vram",
    callback=parse_size,
    multiple=True,
    metavar="SIZE",
    help="Suppose a card with so much free memory; repeat it for several, 0 for none.",
)
@click.option("--ram", callback=parse_size, metavar="SIZE", help="Suppose so much free RAM.")
@click.option("--n-ctx", type=click.IntRange(1), metavar="N", help="Context in tokens.")
@click.option(
    "--slots", type=click.IntRange(1), metavar="N", help="Requests that are served at once."
)
@click.option(
    "--cpu-moe",
    callback=_parse_cpu_moe,
    metavar="auto|on|off|N",
    help="Experts in RAM: by free memory, all, none, or those of the first N layers.",
)
@kv_type_option
@click.option(
    "--load-mode",
    type=click.Choice(LOAD_MODES),
    help="Map the file, or hold the weights in RAM for good, page-locked for a GPU.",
)
@config_option
@json_option
def command(
    *,
    model: str,
    vram: tuple[int, ...],
    ram: int | None,
    n_ctx: int | None,
    slots: int | None,
    cpu_moe: CpuMoe | None,
    kv_type: Any,
    load_mode: Any,
    config_file: Path | None,
    as_json: bool,
) -> None:
    """Explain where MODEL, a name or a .gguf file, would be placed, and why.

    Nothing is loaded. Without --vram and --ram the plan is for this machine as it is now. It is
    that of the daemon, with its settings and the model's, unless MODEL is a file, --config is
    given or none answers.
    """
    from shimpy.cli.output import print_json
    from shimpy.config import load_config
    from shimpy.logs import setup_logging
    from shimpy.placement.explain import plan_to_json

    plan = None
    asked = {"n_ctx": n_ctx, "n_slots": slots, "kv_type": kv_type, "load_mode": load_mode}
    if config_file is None and not is_file(model):
        supposed = {"vram": supposed_cards(vram), "ram": ram}
        plan = _ask_daemon({"model": model, "cpu_moe": cpu_moe, **supposed, **asked})
    if plan is None:
        setup_logging("warning", "auto")
        config = load_config(file=config_file).config
        name, found = find_model(model, config)
        options = plan_options(config, cpu_moe=cpu_moe, **asked)
        hardware = find_hardware(config, vram=vram, ram=ram)
        plan = plan_to_json(make_report(name, found, hardware, options, config))
    if as_json:
        print_json(plan)
    else:
        print_plan(plan)


def _ask_daemon(request: dict[str, Any]) -> dict[str, Any] | None:
    """Return a daemon's plan; None: none answers, or it can't say."""
    from shimpy.client import Client
    from shimpy.config import client_url
    from shimpy.errors import ShimpyError

    try:
        with Client(client_url()) as client:
            plan = client.plan({key: value for key, value in request.items() if value is not None})
    except ShimpyError:
        # What is wrong with the model or the request is found, and told, without it, too.
        return None
    # Older ones say it in figures only.
    return plan if "lines" in plan else None


def is_file(text: str) -> bool:
    """Whether a model is given as a file, not by its name."""
    path = Path(text).expanduser()
    return path.suffix.lower() == ".gguf" or ("/" in text and path.is_file())


def supposed_cards(vram: tuple[int, ...]) -> list[int] | None:
    """Return the free bytes of the supposed cards; None: this machine's own."""
    return [size for size in vram if size] if vram else None


def make_report(
    name: str, model: Model, hardware: Hardware, options: PlanOptions, config: Config
) -> PlanReport:
    """Return the plan of a model, its figures checked by llama.cpp where the devices are there."""
    from shimpy.placement.explain import PlanReport
    from shimpy.placement.speeds import FOLDER, Speeds
    from shimpy.scheduler.simulations import FILE_NAME, Simulations

    speeds = Speeds(config.state_dir / FOLDER)
    simulations = Simulations(config.state_dir / FILE_NAME, speeds=speeds)
    plan = simulations.plan_exactly(model, hardware, options)
    assert model.shape is not None, "find_model returns only models that can be used"
    return PlanReport(model=name, shape=model.shape, hardware=hardware, plan=plan)


def find_model(text: str, config: Config) -> tuple[str, Model]:
    """Return a model, given as a name or as a path to its file, and what to call it.

    Raises:
        NotFoundError, InvalidNameError: there is no such model.
        GgufError: its file is broken.
    """
    from shimpy.registry.registry import Registry, model_of_files

    if is_file(text):
        path = Path(text).expanduser()
        return path.name, model_of_files([path])
    from shimpy.config import tool_folders
    from shimpy.errors import NotFoundError
    from shimpy.registry.own import BuiltIn
    from shimpy.registry.tools import tool_sources

    folders = tool_folders()
    registry = Registry(
        config.model_dirs,
        index_path=config.state_dir / "index.sqlite",
        before=[BuiltIn()],
        after=tool_sources({tool: folders[tool] for tool in config.stores}),
    )
    registry.refresh()
    try:
        model = registry.resolve(text)
    except NotFoundError as error:
        # Its store, and folders given as flags, are known to a running daemon alone.
        return text, model_of_files(_ask_daemon_for_files(text, error))
    return str(model.name), model


def _ask_daemon_for_files(name: str, error: NotFoundError) -> list[Path]:
    from shimpy.client import Client
    from shimpy.config import client_url
    from shimpy.errors import UnreachableError

    try:
        with Client(client_url()) as client:
            return [Path(path) for path in client.show(name)["files"]]
    except UnreachableError:
        raise error from None


def plan_options(config: Config, *, cpu_moe: CpuMoe | None, **given: Any) -> PlanOptions:
    """Return the options that the daemon would plan with, but for those `given` here."""
    from msgspec.structs import replace

    from shimpy.placement.placement import PlanOptions
    from shimpy.scheduler.loads import with_defaults

    options = with_defaults(PlanOptions(**given), config)
    # Here "auto" is an answer, too.
    return options if cpu_moe is None else replace(options, cpu_moe=cpu_moe)


def find_hardware(config: Config, *, vram: tuple[int, ...], ram: int | None) -> Hardware:
    """Return this machine, or the supposed one; `--vram 0` supposes no card."""
    from shimpy.placement.hardware import suppose

    cards = supposed_cards(vram)
    actual = None
    if cards is None or ram is None:
        from shimpy.placement.probe import probe_hardware
        from shimpy.scheduler.overheads import FILE_NAME, Overheads

        actual = probe_hardware(reserve_vram=config.reserve_vram, reserve_ram=config.reserve_ram)
        actual = Overheads(config.state_dir / FILE_NAME).applied(actual)
    return suppose(actual, vram_bytes=cards, ram_bytes=ram)


def print_plan(plan: dict[str, Any]) -> None:
    """Print the choice, its figures and the ladder of alternatives."""
    from shimpy.cli.output import print_table

    for line in plan["lines"]:
        click.echo(line)
    click.echo()
    rows = [_row(rung) for rung in plan["ladder"]]
    print_table(("", "PLACEMENT", "VRAM", "RAM", "CONTEXT", "BATCH", "WEIGHTS IN RAM"), rows)


def _row(rung: dict[str, Any]) -> tuple[str, ...]:
    from shimpy.units import format_bytes

    placement, host = rung["placement"], rung["host"]
    vram = sum(device["total_bytes"] for device in rung["devices"])
    # As Placement.held.
    held = "mapped"
    if host["locked"]:
        held = "page-locked" if rung["devices"] else "private"
    return (
        "*" if rung["chosen"] else "" if rung["fits"] else "x",
        f"{rung['layout']} ({rung['lack']})" if rung["lack"] else rung["layout"],
        format_bytes(vram) if rung["devices"] else "-",
        format_bytes(host["total_bytes"]),
        # What the slots share, or have each.
        f"{placement['n_ctx']}{'/' if placement['kv_unified'] else ' x '}{placement['n_slots']}",
        str(placement["n_ubatch"]),
        held,
    )
