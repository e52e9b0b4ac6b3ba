"""What a worker has sent for one request and its reader has not taken yet; bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from shimpy.protocol.messages import (
    Delta,
    Done,
    Embedded,
    Failed,
    Prefilled,
    Tokenized,
    TokenLogprob,
)

Mail = Delta | Prefilled | Done | Failed | Embedded | Tokenized

# More unread text than this, and nobody is reading any more.
MAX_UNREAD_BYTES = 1024 * 1024

# What a Delta costs besides its text, so that empty ones are bounded too.
_DELTA_BYTES = 64


class Mailbox:
    """A one-reader queue in which waiting pieces of text run together into one."""

    def __init__(self) -> None:
        self._mail: deque[Mail] = deque()
        self._unread_bytes = 0
        # The worker has said its last word on the request; there is nothing to cancel.
        self.is_answered = False
        self._end: BaseException | None = None
        # What the reader waits on: for one reader less work than an Event.
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_overfull(self) -> bool:
        """Whether the reader has fallen too far behind."""
        return self._unread_bytes > MAX_UNREAD_BYTES

    def put(self, mail: Mail) -> None:
        """Add what the worker sent."""
        self._mail.append(mail)
        if isinstance(mail, Delta):
            self._unread_bytes += _size(mail)
        elif not isinstance(mail, Prefilled):
            self.is_answered = True
        # As `_wake`, without the call: this is done for each token.
        if (waiter := self._waiter) is not None and not waiter.done():
            waiter.set_result(None)

    def close(self, error: BaseException) -> None:
        """Let the reader have what is here, then raise `error`; the first close counts."""
        self._end = self._end or error
        self.is_answered = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Mail:
        """Return the oldest mail, with all text that waits right behind it."""
        while not self._mail:
            if self._end is not None:
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        first = self._mail.popleft()
        if not isinstance(first, Delta):
            return first
        if not self._mail:
            self._unread_bytes = 0
            return first
        deltas = [first]
        while self._mail and isinstance(self._mail[0], Delta):
            deltas.append(self._mail.popleft())  # type: ignore[arg-type]
        self._unread_bytes -= sum(map(_size, deltas))
        return first if len(deltas) == 1 else _join(deltas)


def _size(delta: Delta) -> int:
    # UTF-8 takes up to four bytes a character; so does Python's own storage.
    n_bytes = _DELTA_BYTES + 4 * len(delta.text)
    return n_bytes + sum(map(_logprob_size, delta.logprobs)) if delta.logprobs else n_bytes


def _logprob_size(logprob: TokenLogprob) -> int:
    return _DELTA_BYTES * (1 + len(logprob.top))


def _join(deltas: Iterable[Delta]) -> Delta:
    deltas = list(deltas)
    return Delta(
        request=deltas[0].request,
        text="".join(delta.text for delta in deltas),
        n_tokens=sum(delta.n_tokens for delta in deltas),
        logprobs=[logprob for delta in deltas for logprob in delta.logprobs],
    )
