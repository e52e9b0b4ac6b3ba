"""The news of the steps on their way to the daemon: a frame of them now and then.

A frame costs 60 to 150 us, as the daemon wakes up for it, and a small model takes a millisecond
for a step. So what is only more text waits for the next steps, as long as these are likely to end
within a sixtieth of a second after the last text was sent: screens show no more. From steps of 8 ms
on each has its frame. A first token, an end and an error go at once, and nothing waits for a step
that may be long; but where a step is two batches, the text of the first goes with that of the
second. What a request has to say in a frame is one Delta, of however many tokens. The state of the
slots is in no hurry: it goes with a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from shimpy.protocol.messages import Delta, Events, Stats, StepEvent

INTERVAL_S: Final = 1 / 60


class Speaker(Protocol):
    """A request whose text comes bit by bit."""

    request: int

    def delta(self) -> Delta | None:
        """Return what is new since the last one; None: nothing to show."""


class Outbox:
    """What has not been sent yet: of a request in order, its text at the latest."""

    def __init__(self, send: Callable[[Events], None]) -> None:
        self._send = send
        self._news: list[StepEvent] = []
        self._speakers: dict[int, Speaker] = {}
        self._stats: Stats | None = None
        self._has_pressing = False
        # When text was sent last, and when a step ended last.
        self._sent_s = self._stepped_s = -INTERVAL_S

    def add(self, news: StepEvent) -> None:
        """Take what is no text: it goes with the next flush, behind its request's text."""
        speaker = self._speakers.pop(news.request, None)
        if speaker is not None:
            self._hear(speaker)
        self._news.append(news)
        self._has_pressing = True

    def add_text(self, speaker: Speaker) -> None:
        """Note that a request may have new text, which may wait a moment."""
        self._speakers[speaker.request] = speaker

    def add_stats(self, stats: Stats) -> None:
        """Take the state of the slots, to go with the next frame."""
        self._stats = stats

    @property
    def due_s(self) -> float:
        """When text that waits is to be sent."""
        return self._sent_s + INTERVAL_S

    def may_wait(self, now: float) -> bool:
        """Whether the news of a step that ends may wait for those of the next.

        Which is expected to take as long.
        """
        if self._has_pressing:
            return False
        return not self._speakers or 2 * now - self._stepped_s <= self.due_s

    def on_step(self, now: float) -> None:
        """Note the end of a step whose news wait."""
        self._stepped_s = now

    def flush(self, now: float, *, is_halfway: bool = False) -> None:
        """Send what is due at the end of a step; `is_halfway`: of its first half."""
        if is_halfway and not self._has_pressing:
            return
        if not self.may_wait(now):
            self.send(now)
        self._stepped_s = now

    def send(self, now: float) -> None:
        """Send everything at once."""
        if self._speakers:
            n_before = len(self._news)
            for speaker in self._speakers.values():
                self._hear(speaker)
            self._speakers.clear()
            if len(self._news) > n_before:
                self._sent_s = now
        if self._news or self._stats is not None:
            news, self._news = self._news, []
            stats, self._stats = self._stats, None
            self._has_pressing = False
            self._send(Events(news, stats))

    def _hear(self, speaker: Speaker) -> None:
        if (delta := speaker.delta()) is not None:
            self._news.append(delta)
