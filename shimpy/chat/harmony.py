"""Reads harmony, the format of gpt-oss: messages with a header, in channels.

    <|channel|>analysis<|message|>a thought<|end|><|start|>assistant<|channel|>final<|message|>...
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>

Source: https://github.com/openai/harmony/blob/main/docs/format.md
"""

from __future__ import annotations

import re
from enum import Enum, auto

from shimpy.chat.calls import parse_arguments
from shimpy.chat.events import ContentDelta, OutputEvent, ThinkingDelta, merge
from shimpy.chat.formats import HARMONY_MARKS
from shimpy.chat.marks import Marks
from shimpy.chat.messages import ToolCall

_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS = HARMONY_MARKS
_MARKS = Marks(HARMONY_MARKS)
_RECIPIENT = re.compile(r"to=([^\s<]{1,256})")
MAX_HEADER_CHARS = 1024


class _State(Enum):
    HEADER = auto()
    MESSAGE = auto()
    BETWEEN = auto()


_HEADER_WORDS = ("assistant", "analysis", "commentary", "final", "json", "to=")


def _are_header_words(text: str) -> bool:
    """Whether these words, the last perhaps cut off, can be those of a header."""
    for mark in HARMONY_MARKS:
        text = text.replace(mark, " ")
    return all(
        word.startswith("to=") or any(known.startswith(word) for known in _HEADER_WORDS)
        for word in text.split()
    )


class HarmonyParser:
    """Thoughts are the analysis channel, calls what has a recipient, content the rest."""

    def __init__(self, *, prompt: str = "", call_id: str = "call_") -> None:
        self._buffer = ""
        self._state = _State.HEADER
        # The marks and words of the header that is being read, or that was read last.
        self._header = ""
        # The text of a call, as it comes.
        self._arguments: list[str] = []
        self._call_id = call_id
        self._n_calls = 0
        _, start, tail = prompt.rpartition(_START)
        if start and _MESSAGE in tail:
            # The prompt leaves a message open, for the model to go on with.
            self._header = tail.partition(_MESSAGE)[0]
            self._state = _State.MESSAGE

    def push(self, text: str) -> list[OutputEvent]:
        """Take more output; return what is certain now."""
        self._buffer += text
        events: list[OutputEvent] = []
        while self._step(events):
            pass
        return merge(events)

    def finish(self) -> list[OutputEvent]:
        """Return what was held back; the output has ended."""
        rest, self._buffer = self._buffer, ""
        events: list[OutputEvent] = []
        if self._state is _State.MESSAGE:
            self._say(rest, events)
            self._end_message(events)
        elif not (_MARKS.find(self._header) and _are_header_words(self._header)):
            # Without a mark, or with other words in it, it was no header after all.
            events.append(ContentDelta(self._header + rest))
        return merge(events)

    def _step(self, events: list[OutputEvent]) -> bool:
        """Use up the buffer to the next mark; False: there is none."""
        found = _MARKS.find(self._buffer)
        if found is None:
            n_held = _MARKS.held(self._buffer)
            text = self._buffer[: len(self._buffer) - n_held]
            self._buffer = self._buffer[len(text) :]
            self._on_text(text, events)
            return False
        at, mark = found
        text, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
        self._on_text(text, events)
        self._on_mark(mark, events)
        return True

    def _on_text(self, text: str, events: list[OutputEvent]) -> None:
        if self._state is _State.MESSAGE:
            self._say(text, events)
            return
        if self._state is _State.BETWEEN:
            text = text.lstrip()
            if not text:
                return
        self._header += text
        if not self._is_header():
            text, self._header = self._header, ""
            self._state = _State.MESSAGE
            self._say(text, events)
        else:
            self._state = _State.HEADER

    def _is_header(self) -> bool:
        """Whether what was read so far can be a message's header."""
        found = _MARKS.find(self._header)
        words = self._header if found is None else self._header[: found[0]]
        return len(self._header) <= MAX_HEADER_CHARS and _are_header_words(words)

    def _on_mark(self, mark: str, events: list[OutputEvent]) -> None:
        if mark in (_START, *_ENDS) or (mark == _CHANNEL and self._state is not _State.HEADER):
            if self._state is _State.MESSAGE:
                self._end_message(events)
            self._header = mark if mark == _CHANNEL else ""
            self._state = _State.BETWEEN if mark in _ENDS else _State.HEADER
        elif self._state is _State.MESSAGE:
            self._say(mark, events)
        elif mark == _MESSAGE:
            self._state = _State.MESSAGE
        else:
            self._header += mark
            self._state = _State.HEADER

    def _say(self, text: str, events: list[OutputEvent]) -> None:
        channel = self._header.partition(_CHANNEL)[2].split()
        if _RECIPIENT.search(self._header):
            self._arguments.append(text)
        elif channel and channel[0].startswith("analysis"):
            events.append(ThinkingDelta(text))
        else:
            events.append(ContentDelta(text))

    def _end_message(self, events: list[OutputEvent]) -> None:
        recipient = _RECIPIENT.search(self._header)
        if recipient is None:
            return
        text = "".join(self._arguments)
        self._arguments.clear()
        call = parse_arguments(recipient.group(1).removeprefix("functions."), text)
        if call is None:
            events.append(ContentDelta(self._header + _MESSAGE + text))
            return
        name, arguments = call
        events.append(
            ToolCall(id=f"{self._call_id}{self._n_calls}", name=name, arguments=arguments)
        )
        self._n_calls += 1
