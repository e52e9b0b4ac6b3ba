"""The news of the steps on their way to the daemon: a frame of them now and then.

A frame costs 60 to 150 us, as the daemon wakes up for it, and a small model takes a millisecond
for a step. So what is only more text waits for the next steps, up to 4 ms after the last text
was sent: 250 frames a second are more than anyone can read or draw. A first token, an end and an
error go at once, and nothing waits for a step that may be long; but where a step is two batches,
the text of the first goes with that of the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from shimpy.protocol.messages import Delta, Events, StepEvent

INTERVAL_S: Final = 0.004


class Outbox:
    """What has not been sent yet, in order."""

    def __init__(self, send: Callable[[Events], None]) -> None:
        self._send = send
        self._news: list[StepEvent] = []
        self._has_pressing = False
        self._sent_s = -INTERVAL_S

    def add(self, news: StepEvent) -> None:
        """Take what is no text: it goes with the next flush."""
        self._news.append(news)
        self._has_pressing = True

    def add_text(self, delta: Delta) -> None:
        """Take a text, which may wait a moment."""
        self._news.append(delta)

    def flush(self, now: float, *, is_halfway: bool = False) -> None:
        """Send what is due at the end of a step; `is_halfway`: of its first half."""
        if self._has_pressing:
            # A first text may follow its Prefilled a step later: it does not wait.
            self.send()
        elif self._news and not is_halfway and now - self._sent_s >= INTERVAL_S:
            self.send()
            self._sent_s = now

    def send(self) -> None:
        """Send everything at once."""
        if self._news:
            news, self._news = self._news, []
            self._has_pressing = False
            self._send(Events(news))
