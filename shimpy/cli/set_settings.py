"""`shimpy set`: set what lasts about a model, wherever it lies."""

from __future__ import annotations

from typing import Any

import click

from shimpy.cli.options import complete_model, hint_if_idle, json_option


@click.command(name="set")
@click.argument("model", shell_complete=complete_model)
@click.argument("pairs", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--unset", multiple=True, metavar="KEY", help="Take a setting back.")
@json_option
def command(model: str, pairs: tuple[str, ...], unset: tuple[str, ...], *, as_json: bool) -> None:
    """Set what lasts about MODEL; without KEY=VALUE show what is set.

    Keys are Ollama's parameters (num_ctx, temperature, stop, ...), and cpu_moe (auto, on, off
    or a number of layers), keep_alive, system, template, raw (on or off), license, aliases
    (with commas between) and notes. A value that begins with @ names a file to read it from.
    """
    from shimpy.cli.autostart import connect
    from shimpy.cli.output import print_json

    values = parse_pairs(pairs)
    with connect() as client:
        answer = client.change_settings(model, values, unset)
    for key in values:
        hint_if_idle(key)
    if as_json:
        print_json(answer["settings"])
        return
    for key, value in _lines(answer["settings"]):
        click.echo(f"{key:<20} {value}")


def parse_pairs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return "key=value" pairs as JSON values; texts stay texts, `stop` may come often.

    Raises:
        InvalidOptionError: a pair has no '='.
        UserError: its file can't be read.
    """
    import json
    from pathlib import Path

    from shimpy.cli.output import read_text
    from shimpy.errors import InvalidOptionError

    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InvalidOptionError(f"{pair!r} is no setting; write it like num_ctx=8192")
        if text.startswith("@"):
            text = read_text(Path(text[1:]).expanduser())
        if key == "stop":
            values.setdefault("stop", []).extend([text] if text else [])
            continue
        try:
            values[key] = text if key in _TEXTS else json.loads(text)
        except ValueError:
            values[key] = text
    return values


# Never taken for JSON, though they may look like it.
_TEXTS = frozenset({"system", "template", "license", "notes", "aliases", "alias"})


def _lines(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is set as keys and values, as they would be typed."""
    lines: list[tuple[str, str]] = []
    for key, value in settings.pop("parameters", {}).items():
        items = value if isinstance(value, list) else [value]
        lines += [(key, typed(key, item)) for item in items]
    for field, value in settings.items():
        key = field.removesuffix("_s")
        lines.append((key, typed(key, value)))
    return lines


def typed(key: str, value: Any) -> str:
    """Return a setting's value as it would be typed for KEY=VALUE."""
    import json

    from shimpy.units import format_duration

    if key == "keep_alive":
        return "-1" if value < 0 else format_duration(value)
    if key == "aliases":
        return ",".join(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
