"""Work that may be stopped from outside, and that is tried again when it fails in passing."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import msgspec

from shimpy.errors import RemoteError
from shimpy.registry.remote import TransientError
from shimpy.units import format_duration

_LONGEST_PAUSE_S: Final = 60.0

T = TypeVar("T")
# Takes words for whoever waits.
Tell = Callable[[str], None]


class StoppedError(Exception):
    """The work was stopped from outside; what has come is kept."""


class Stop:
    """Ends the work of one thread from another: between two chunks, and in a read that hangs."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._abort: Callable[[], None] | None = None

    def set(self) -> None:
        """Ask the work to end."""
        with self._lock:
            self._event.set()
            if self._abort is not None:
                self._abort()

    @property
    def is_set(self) -> bool:
        """Whether it was asked to end."""
        return self._event.is_set()

    def check(self) -> None:
        """Return if the work is to go on.

        Raises:
            StoppedError: it is not.
        """
        if self._event.is_set():
            raise StoppedError

    def wait(self, seconds: float) -> None:
        """Wait, unless the work is to end; errors as `check`."""
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def breaking(self, abort: Callable[[], None]) -> Iterator[None]:
        """Have `abort` called when the work is to end while this context is open."""
        with self._lock:
            self._abort = abort
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._abort = None


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often something is tried that fails in passing, and how long between."""

    most: int = 6
    first_pause_s: float = 1.0

    def pause_s(self, n_failed: int, wish_s: float | None) -> float:
        """Return how long to wait after so many failures in a row."""
        grown: float = self.first_pause_s * 2 ** (n_failed - 1)
        # So that many clients of a server that comes back do not come at once.
        spread = random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        return min(max(grown * spread, wish_s or 0.0), _LONGEST_PAUSE_S)

    def run(self, action: Callable[[], T], stop: Stop, tell: Tell | None = None) -> T:
        """Return what `action` does, tried until it does it; `tell` hears of each failure.

        Raises:
            RemoteError: it failed too often in passing; says how it did last.
            StoppedError: the work is to end.
        """
        n_failed = 0
        while True:
            stop.check()
            try:
                return action()
            except TransientError as error:
                n_failed += 1
                self.give_up_or_wait(error, n_failed, stop, tell)

    def give_up_or_wait(
        self, error: TransientError, n_failed: int, stop: Stop, tell: Tell | None = None
    ) -> None:
        """Wait before the next attempt; errors as `run`."""
        stop.check()
        if n_failed >= self.most:
            raise RemoteError(
                f"given up after {n_failed} attempts in a row that failed, the last with: {error}; "
                "what has come is kept, the next pull goes on from there"
            ) from error
        pause_s = self.pause_s(n_failed, error.retry_after_s)
        if tell is not None:
            tell(f"{error}; trying again in {format_duration(pause_s)}")
        stop.wait(pause_s)
