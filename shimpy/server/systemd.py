"""The notify protocol and the sockets of systemd: sd_notify(3), sd_listen_fds(3).

Whoever starts the daemon may listen: systemd with Type=notify, or `shimpy run` when it
starts a daemon in the background.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

# The first inherited descriptor, by definition of the protocol.
_FIRST_FD = 3
_US_PER_S = 1e6


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


def notify_reloading() -> None:
    """Tell that a reload begins, and when, as systemd wants it; READY=1 ends it."""
    now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify(f"RELOADING=1\nMONOTONIC_USEC={now_us}")


def watchdog_period_s() -> float | None:
    """Return how often the watchdog wants to hear from this process; None: there is none."""
    pid = os.environ.get("WATCHDOG_PID")
    if pid and pid != str(os.getpid()):
        return None
    try:
        limit_us = int(os.environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    # Half of the limit, as sd_watchdog_enabled(3) advises.
    return limit_us / _US_PER_S / 2 if limit_us > 0 else None


async def feed_watchdog(period_s: float) -> None:
    """Tell systemd for ever that the event loop runs, which is the scheduler's own.

    A loop that is stuck feeds nobody, and the daemon is started anew.
    """
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_s)


def inherited_sockets() -> list[socket.socket]:
    """Take over the listening sockets of a socket unit; none where this process got none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    n_sockets = int(os.environ.get("LISTEN_FDS", "0"))
    sockets = []
    for descriptor in range(_FIRST_FD, _FIRST_FD + n_sockets):
        # Workers must not hold them open beyond the daemon's end.
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - os's own signature
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)  # noqa: FBT003 - the socket module's own signature
        sockets.append(sock)
    return sockets
