"""`shimpy show`: what a model is and can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from shimpy.cli.options import complete_model, json_option


@click.command(name="show")
@click.argument("model", shell_complete=complete_model)
@click.option("--modelfile", "part", flag_value="modelfile", help="Only its Modelfile.")
@click.option("--parameters", "part", flag_value="parameters", help="Only its parameters.")
@click.option("--template", "part", flag_value="template", help="Only its prompt template.")
@click.option("--system", "part", flag_value="system", help="Only its system message.")
@click.option("--license", "part", flag_value="license", help="Only its licence.")
@click.option("--verbose", is_flag=True, help="Whole arrays and tensors, with --json.")
@json_option
def command(model: str, part: str | None, *, verbose: bool, as_json: bool) -> None:
    """Show what MODEL is and can do."""
    from shimpy.cli.autostart import connect
    from shimpy.cli.output import print_json

    with connect() as client:
        shown = client.show(model, verbose=verbose)
    if as_json:
        print_json(shown)
    elif part is not None:
        _print_part(model, part, shown.get(part) or "")
    else:
        print_sections(shown)


def _print_part(model: str, part: str, text: str) -> None:
    from shimpy.cli.output import hint

    if text:
        click.echo(text)
    else:
        hint(f"{model} has no {part}" + (" of its own" if part == "parameters" else ""))


def print_sections(shown: dict[str, Any]) -> None:
    """Print what `show` answers, section by section."""
    from shimpy.cli.set_settings import typed

    details, info = shown["details"], shown["model_info"]
    arch = info.get("general.architecture", details["family"])
    _print_section(
        "Model",
        {
            "architecture": arch,
            "parameters": details["parameter_size"],
            "context length": info.get(f"{arch}.context_length"),
            "embedding length": info.get(f"{arch}.embedding_length"),
            "quantization": details["quantization_level"],
            "from": shown.get("source"),
            "made from": details.get("parent_model") or None,
        }.items(),
    )
    experts = shown.get("experts")
    if experts and experts["tensors"]:
        from shimpy.units import format_bytes

        _print_section(
            "Experts",
            {
                "routed": experts["n_expert"],
                "shared": experts["n_expert_shared"],
                "active": experts["n_expert_used"],
                "tensors": experts["tensors"],
                "size": format_bytes(experts["bytes"]),
            }.items(),
        )
    _print_section("Capabilities", [(name, "") for name in shown["capabilities"]])
    lines = (shown.get("parameters") or "").splitlines()
    _print_section("Parameters", [(name, " ".join(rest)) for name, *rest in map(_words, lines)])
    settings = shown.get("settings") or {}
    _print_section("Settings", [(k, typed(k, v)) for k, v in settings.items() if k != "aliases"])
    problem = shown.get("template_problem")
    _print_section("Template", [("not used: " + problem, "")] if problem else [])
    _print_section("Aliases", [(alias, "") for alias in shown.get("aliases") or ()])
    _print_section("System", [(line, "") for line in (shown.get("system") or "").splitlines()])
    license_lines = (shown.get("license") or "").splitlines()[:2]
    _print_section("License", [(line, "") for line in license_lines])


def _words(line: str) -> list[str]:
    return line.split(None, 1)


def _print_section(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    shown = [(key, value) for key, value in rows if value is not None]
    if not shown:
        return
    # Texts of several lines stand alone: only keys with a value are made equally wide.
    width = max((len(key) for key, value in shown if value != ""), default=0)
    click.echo(f"  {title}")
    for key, value in shown:
        click.echo(f"    {key:<{width}}    {value}".rstrip())
    click.echo()
