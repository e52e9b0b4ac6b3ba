"""The time that the scheduler measures by: the loop's, or a test's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class TimerHandle(Protocol):
    """Something that was arranged for later."""

    def cancel(self) -> None:
        """Arrange that it does not happen."""


class Clock(Protocol):
    """The time that keep_alive and patience are measured by."""

    def now(self) -> float:
        """Return seconds that never go back."""

    def call_at(self, when_s: float, callback: Callable[[], None]) -> TimerHandle:
        """Arrange a call at a time of this clock."""


class LoopClock:
    """The running event loop's clock."""

    def now(self) -> float:
        """Return the loop's time."""
        return asyncio.get_running_loop().time()

    def call_at(self, when_s: float, callback: Callable[[], None]) -> TimerHandle:
        """Arrange a call on the loop."""
        return asyncio.get_running_loop().call_at(when_s, callback)


def to_epoch(clock: Clock, at_s: float) -> float:
    """Return a time of a clock's as seconds since the epoch."""
    return time.time() + at_s - clock.now()
