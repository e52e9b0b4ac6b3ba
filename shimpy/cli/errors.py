"""From exceptions to messages and exit codes, so that no command wraps its calls in try."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

import click

from shimpy.errors import InvalidNameError, InvalidOptionError, ShimpyError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def run_and_exit(command: click.Command) -> NoReturn:
    """Run a command with the process's arguments and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows fewer letters shows a mark in place of the others.
            stream.reconfigure(errors="replace")
    try:
        code = command.main(standalone_mode=False, color=_color())
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except ShimpyError as error:
        click.echo(f"Error: {error.message}", err=True)
        sys.exit(_exit_code(error))
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(f"Error: {error.filename}: {error.strerror}", err=True)
        sys.exit(EXIT_FAILED)
    sys.exit(code if isinstance(code, int) else 0)


def _color() -> bool | None:
    """Return False where no colour is wanted (no-color.org) or can be shown; None: on terminals."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return False if plain else None


def _exit_code(error: ShimpyError) -> int:
    return EXIT_USAGE if isinstance(error, InvalidOptionError | InvalidNameError) else EXIT_FAILED
