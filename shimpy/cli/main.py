"""The group of commands. `shimpy --help` imports none of them: that keeps it quick."""

from __future__ import annotations

import importlib

import click

from shimpy import __version__
from shimpy.cli.errors import run_and_exit

# Name to module and help line, in the order that `--help` shows.
COMMANDS = {
    "serve": ("shimpy.cli.serve", "Run the daemon."),
    "run": ("shimpy.cli.run", "Run a model: a prompt, standard input, or a chat."),
    "pull": ("shimpy.cli.pull", "Pull a model, once it is known how it will run here."),
    "catalog": ("shimpy.cli.catalog", "List the models that can be pulled by a short name."),
    "list": ("shimpy.cli.list_models", "List the models on this machine."),
    "show": ("shimpy.cli.show", "Show what a model is and can do."),
    "ps": ("shimpy.cli.ps", "Show the loaded models and where they are placed."),
    "events": ("shimpy.cli.events", "Show what is loaded, unloaded and evicted, and why."),
    "stop": ("shimpy.cli.stop", "Unload a model."),
    "pin": ("shimpy.cli.pin", "Keep a model loaded, once it is, whoever needs its memory."),
    "unpin": ("shimpy.cli.unpin", "Let a pinned model leave again as others do."),
    "plan": ("shimpy.cli.plan", "Explain where a model would be placed, and why."),
    "bench": ("shimpy.cli.bench", "Measure a model in each placement that fits."),
    "create": ("shimpy.cli.create", "Make a model from a Modelfile."),
    "set": ("shimpy.cli.set_settings", "Set what lasts about a model, wherever it lies."),
    "cp": ("shimpy.cli.cp", "Give a model a second name."),
    "rm": ("shimpy.cli.rm", "Remove models from the store."),
    "gc": ("shimpy.cli.gc", "Remove files that no model needs."),
    "verify": ("shimpy.cli.verify", "Read the store's files again and check their digests."),
    "service": ("shimpy.cli.service", "Install the daemon as a systemd service, or remove it."),
    "doctor": ("shimpy.cli.doctor", "Test what the daemon needs, and say what mends it."),
    "logs": ("shimpy.cli.logs", "Show the daemon's log."),
    "reload": ("shimpy.cli.reload", "Let the daemon read its config again."),
    "keys": ("shimpy.cli.keys", "Make, list and revoke API keys."),
    "config": ("shimpy.cli.config", "Show every setting and where its value comes from."),
}
ALIASES = {"ls": "list"}


class _LazyGroup(click.Group):
    """Imports a command's module when the command is used."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], [*COMMANDS, *ALIASES], n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Client commands talk to the daemon at SHIMPY_HOST, or else where the setting bind "
    "has it listen (127.0.0.1:11435).",
)
@click.version_option(__version__, "-v", "--version", message="shimpy %(version)s")
def cli() -> None:
    """Find, place and serve GGUF models on this machine."""


def main() -> None:
    """Run the command line and exit."""
    run_and_exit(cli)
