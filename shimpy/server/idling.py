"""The end of a daemon that nobody needs: the one that `shimpy run` started by itself."""

from __future__ import annotations

import asyncio

from shimpy.server.services import Services

# How often it is looked whether there is anything to do, in parts of the time.
_LOOKS = 10


async def wait_unneeded(services: Services, idle_s: float) -> None:
    """Return when for `idle_s` no request has run and no model was loaded."""
    loop, lifecycle = asyncio.get_running_loop(), services.lifecycle
    n_begun, since_s = -1, 0.0
    while True:
        now = loop.time()
        is_needed = lifecycle.n_running > 0 or bool(services.scheduler.residents())
        if is_needed or lifecycle.n_begun != n_begun:
            n_begun, since_s = lifecycle.n_begun, now
        elif now - since_s >= idle_s:
            return
        await asyncio.sleep(idle_s / _LOOKS)
