"""A daemon on this machine that holds models while others are to be measured."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

if TYPE_CHECKING:
    from shimpy.client import Client

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_UNLOAD_S = 30.0
_POLL_S = 0.1


def make_room(*, unload: bool) -> None:
    """Say what a daemon on this machine holds, and have it unloaded where that is wanted."""
    from shimpy.cli.output import hint, waiting
    from shimpy.client import Client
    from shimpy.config import client_url
    from shimpy.errors import DaemonError, UnreachableError

    url = client_url()
    if not is_local(url):
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


def is_local(url: str) -> bool:
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
