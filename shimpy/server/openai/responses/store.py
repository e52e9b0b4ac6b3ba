"""What was said in earlier responses, for `previous_response_id`: in memory, and bounded."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from shimpy.chat.messages import ChatMessage
from shimpy.errors import InvalidOptionError
from shimpy.server.openai.responses.wire import Response

MAX_RESPONSES = 1024
# Characters of all that is kept; the conversations of one chain share their messages.
MAX_CHARS = 16 * 1024 * 1024


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A finished response, and the conversation up to its end without the instructions."""

    response: Response
    messages: tuple[ChatMessage, ...]
    # Characters that it added to the conversation.
    n_chars: int


class ResponseStore:
    """The responses of late; it belongs to the event loop's thread, and ends with the daemon."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_chars: int = MAX_CHARS) -> None:
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._n_chars = 0

    def add(self, stored: StoredResponse) -> None:
        """Keep a response; those that were used least recently make room."""
        self._stored[stored.response.id] = stored
        self._n_chars += stored.n_chars
        while len(self._stored) > self._max_responses or self._n_chars > self._max_chars:
            _, gone = self._stored.popitem(last=False)
            self._n_chars -= gone.n_chars

    def get(self, response_id: str) -> StoredResponse | None:
        """Return a response; None: it was never kept, or has made room."""
        stored = self._stored.get(response_id)
        if stored is not None:
            self._stored.move_to_end(response_id)
        return stored

    def conversation(self, response_id: str | None) -> tuple[ChatMessage, ...]:
        """Return what was said up to a response's end; None is the beginning.

        Raises:
            InvalidOptionError: it is not here.
        """
        if response_id is None:
            return ()
        stored = self.get(response_id)
        if stored is None:
            raise InvalidOptionError(
                f"Previous response with id {response_id[:80]!r} not found: responses are kept in "
                f"memory until the daemon stops, the last {self._max_responses} of them, unless "
                "store is false; send the whole conversation as input instead",
                option="previous_response_id",
            )
        return stored.messages

    def remove(self, response_id: str) -> bool:
        """Forget a response; False: it is not here."""
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._n_chars -= stored.n_chars
        return stored is not None
