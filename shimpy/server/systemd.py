"""The notify protocol of systemd (sd_notify(3)): state changes as datagrams.

Whoever starts the daemon may listen: systemd with Type=notify, or `shimpy run` when it
starts a daemon in the background.
"""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send a state such as "READY=1" to NOTIFY_SOCKET; nothing happens where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            # The listener has gone; the daemon does not depend on it.
            return
