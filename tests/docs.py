"""Writes the docs that follow from the code: `python -m tests.docs`.

tests/test_docs.py fails when they are out of date.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path

import click

from shimpy.cli.main import COMMANDS, cli
from shimpy.config import HELP, METAVARS, Config

DOCS = Path(__file__).parent.parent / "docs"


def cli_page() -> str:
    """Return docs/cli.md: the help of every command."""
    parts = [
        "# Command line",
        "",
        "Written by `python -m tests.docs` from the commands' own help.",
        "",
        "Data goes to standard output, all else to standard error; nothing is coloured where it",
        "is piped or `NO_COLOR` is set. A command exits with 0, with 1 where it failed, with 2",
        "where it was typed wrongly. In a shell,",
        '`eval "$(_SHIMPY_COMPLETE=bash_source shimpy)"` (`zsh_source`, `fish_source`) has',
        "commands, options and names of models completed.",
        "",
        _help_of(cli, "shimpy"),
    ]
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        parts += [f"## shimpy {name}", "", _help_of(command, f"shimpy {name}")]
        if isinstance(command, click.Group):
            for below, sub in sorted(command.commands.items()):
                parts.append(_help_of(sub, f"shimpy {name} {below}"))
    return "\n".join(parts)


def _help_of(command: click.Command, path: str) -> str:
    # A copy: click keeps the help option of the first context that a command was used in.
    command = copy.copy(command)
    command._help_option = None
    context = click.Context(
        command, info_name=path, terminal_width=96, help_option_names=["-h", "--help"]
    )
    return f"```\n{command.get_help(context)}\n```\n"


def config_page() -> str:
    """Return docs/config.md: every setting."""
    lines = [
        "# Configuration",
        "",
        "Each setting comes from the last of these that gives it: its default,",
        "`/etc/shimpy/config.toml`, `config.toml` in the user's config folder (or instead of both",
        "the file named by `--config`), `SHIMPY_<NAME>` in the environment, a flag of `shimpy",
        "serve`. `shimpy config` prints every value and where it came from. An unknown key is an",
        "error.",
        "",
        "| setting | form | default | what it does |",
        "|---|---|---|---|",
    ]
    for field in fields(Config):
        default = _default_of(field.name, field.default)
        form = METAVARS[field.name].replace("|", "\\|")
        lines.append(f"| `{field.name}` | {form} | {default} | {HELP[field.name]} |")
    lines += [
        "",
        "Sizes are written like `512MiB` or `8G` (powers of 1024), times like `90s`, `5m` or",
        "`1h30m`. The same names, upper case behind `SHIMPY_`, work in the environment, and with",
        "dashes as flags: `n_ctx` is `SHIMPY_N_CTX` and `--n-ctx`.",
        "",
        "Four more variables say where things are:",
        "",
        "| variable | what it does |",
        "|---|---|",
        "| `SHIMPY_HOST` | where commands look, if not at `bind`: `host:port`, URL, `unix:/path` |",
        "| `SHIMPY_API_KEY` | the key that client commands send |",
        "| `SHIMPY_HOME` | one folder for all state, in place of the platform's usual folders |",
        "| `SHIMPY_CONFIG` | the config file, like `--config` |",
        "",
    ]
    return "\n".join(lines)


def _default_of(name: str, default: object) -> str:
    if name.endswith("_dir"):
        return "the platform's"
    if name == "model_dirs":
        return "`models` in data_dir, `~/models`"
    if name == "stores":
        return "`all`"
    if default is None:
        return "-"
    if isinstance(default, bool):
        return f"`{'on' if default else 'off'}`"
    from shimpy.units import format_bytes, format_duration

    if METAVARS[name] == "SIZE" and isinstance(default, int):
        return f"`{format_bytes(default)}`"
    if METAVARS[name] == "TIME" and isinstance(default, float):
        return f"`{format_duration(default)}`"
    return f"`{default}`"


PAGES = {"cli.md": cli_page, "config.md": config_page}


if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
