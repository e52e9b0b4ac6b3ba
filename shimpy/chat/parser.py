"""Splits what a model writes into thoughts, content and calls, as it comes.

    thinking ──closer──▶ content ──opener──▶ call ──end──▶ content
        ▲                   │
        └──────opener───────┘  (at the beginning of the answer)

Text is held back only while it may still become a mark, or is white space that a mark would
swallow. Nothing is lost: a call that turns out malformed becomes content, marks and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from shimpy.chat.bodies import HOPELESS, EndFinder, JsonEnd, find_end
from shimpy.chat.calls import Call, parse_calls
from shimpy.chat.events import ContentDelta, OutputEvent, ThinkingDelta, merge
from shimpy.chat.formats import HERMES, SYNTAXES, ChatFormat, ThinkingTags, ToolSyntax
from shimpy.chat.harmony import HarmonyParser
from shimpy.chat.marks import Marks
from shimpy.chat.messages import ToolCall, ToolSpec


class OutputParser(Protocol):
    """Takes the text of one answer in pieces."""

    def push(self, text: str) -> list[OutputEvent]:
        """Take more output; return what is certain now."""

    def finish(self) -> list[OutputEvent]:
        """Return what was held back; the output has ended."""


def make_parser(
    chat_format: ChatFormat,
    *,
    prompt: str = "",
    tools: Sequence[ToolSpec] = (),
    split_thinking: bool = True,
    call_id: str = "call_",
) -> OutputParser:
    """Return the parser for an answer to `prompt`, which may end inside a thought.

    Calls are looked for only where there are `tools`; their ids are `call_id` and a number.
    Without `split_thinking` thoughts stay in the content, with their tags.
    """
    if chat_format.kind == "harmony":
        return HarmonyParser(prompt=prompt, call_id=call_id)
    return TaggedParser(
        chat_format,
        opened=split_thinking and chat_format.opens_thinking(prompt),
        tools=tools,
        split_thinking=split_thinking,
        call_id=call_id,
    )


class _State(Enum):
    THINKING = auto()
    CONTENT = auto()
    CALL = auto()
    # A bare JSON object, which may be a call.
    BARE = auto()


_BARE = ToolSyntax(name="bare", opener="", body="json")
_BARE_KEYS = ('"name"', '"type"', '"function"', '"parameters"', '"arguments"')


class TaggedParser:
    """Parses output in which thoughts and calls stand between marks."""

    def __init__(
        self,
        chat_format: ChatFormat,
        *,
        opened: bool,
        tools: Sequence[ToolSpec],
        split_thinking: bool,
        call_id: str,
    ) -> None:
        self._tags: ThinkingTags | None = chat_format.thinking if split_thinking else None
        self._specs = {tool.name: tool for tool in tools}
        self._bare = chat_format.bare_json and bool(tools)
        self._call_id = call_id
        self._n_calls = 0
        self._buffer = ""
        self._state = _State.THINKING if opened else _State.CONTENT
        # No answer yet: a thought or a bare call may begin here.
        self._fresh = True
        # White space here belongs to a mark before it.
        self._skip_space = opened
        # Marks that may follow here, in this order, and mean nothing. Some models open the
        # thought that the prompt has opened.
        self._swallow: tuple[str, ...] = ()
        if opened and self._tags is not None:
            self._swallow = (self._tags.opener,)
        # White space that was held back before a call.
        self._space = ""
        self._syntax = _BARE
        self._finder: EndFinder | None = None
        syntaxes = SYNTAXES if tools else ()
        self._openers = {syntax.opener: syntax for syntax in syntaxes}
        self._noise = set(chat_format.tool.noise if tools else ())
        opener = []
        if self._tags is not None:
            self._noise.update(self._tags.noise)
            opener = [self._tags.opener]
            self._closer = Marks([self._tags.closer])
        self._marks = Marks([*self._openers, *self._noise])
        self._fresh_marks = Marks([*self._openers, *self._noise, *opener])

    def push(self, text: str) -> list[OutputEvent]:
        """Take more output; return what is certain now."""
        self._buffer += text
        events: list[OutputEvent] = []
        while self._step(events, last=False):
            pass
        return merge(events)

    def finish(self) -> list[OutputEvent]:
        """Return what was held back; the output has ended."""
        events: list[OutputEvent] = []
        while self._step(events, last=True):
            pass
        return merge(events)

    def _step(self, events: list[OutputEvent], *, last: bool) -> bool:
        """Do the next thing that the buffer allows; False: it allows none."""
        if not self._buffer and self._state is not _State.CALL:
            return False
        match self._state:
            case _State.THINKING:
                return self._think(events, last=last)
            case _State.CONTENT:
                return self._answer(events, last=last)
            case _State.CALL:
                return self._call(events, last=last)
            case _State.BARE:
                return self._bare_call(events, last=last)

    # --- thinking ---------------------------------------------------------------------------

    def _think(self, events: list[OutputEvent], *, last: bool) -> bool:
        if self._skip_space and not self._strip_space():
            return self._drop_all(last=last)
        found = self._closer.find(self._buffer)
        if found is not None:
            at, mark = found
            events.append(ThinkingDelta(self._buffer[:at].rstrip()))
            self._buffer = self._buffer[at + len(mark) :]
            self._state = _State.CONTENT
            self._skip_space = True
            return True
        self._emit(ThinkingDelta, 0 if last else self._n_held(self._closer), events)
        return False

    # --- content ----------------------------------------------------------------------------

    def _answer(self, events: list[OutputEvent], *, last: bool) -> bool:
        if self._skip_space and not self._strip_space():
            return self._drop_all(last=last)
        if self._fresh and self._bare and (start := self._buffer.lstrip()[:1]) in ("{", ""):
            if not start and not last:
                return False
            if start:
                self._state = _State.BARE
                self._finder = JsonEnd()
                return True
        marks = self._fresh_marks if self._fresh else self._marks
        found = marks.find(self._buffer)
        if found is None:
            n_held = 0 if last else self._n_held(marks)
            if self._buffer[: len(self._buffer) - n_held].strip():
                self._fresh = False
            self._emit(ContentDelta, n_held, events)
            return False
        self._on_mark(*found, events)
        return True

    def _on_mark(self, at: int, mark: str, events: list[OutputEvent]) -> None:
        before, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
        text = before.rstrip()
        if text and self._tags is not None and mark == self._tags.opener:
            # A thought begins only where nothing was said; this is a word of the answer.
            self._fresh = False
            self._buffer = mark + self._buffer
            events.append(ContentDelta(before))
            return
        events.append(ContentDelta(text))
        self._fresh = self._fresh and not text
        if mark in self._openers:
            self._space = before[len(text) :]
            self._syntax, self._finder = self._openers[mark], None
            self._state = _State.CALL
        elif mark in self._noise:
            self._skip_space = True
        else:
            self._state = _State.THINKING
            self._skip_space = True

    # --- calls ------------------------------------------------------------------------------

    def _call(self, events: list[OutputEvent], *, last: bool) -> bool:
        if self._finder is None:
            self._finder = find_end(self._syntax, self._buffer)
        end = self._finder.find(self._buffer) if self._finder is not None else None
        if end is None:
            if not last:
                return False
            end = len(self._buffer)
        if end == HOPELESS:
            self._give_up(0, events)
            return True
        calls = parse_calls(self._syntax.body, self._buffer[:end], self._specs)
        if calls:
            self._take(calls, end, events)
        else:
            closed = self._buffer.startswith(self._syntax.closer, end)
            self._give_up(end + (len(self._syntax.closer) if closed else 0), events)
        return True

    def _bare_call(self, events: list[OutputEvent], *, last: bool) -> bool:
        self._syntax = _BARE
        start = self._buffer.lstrip()[1:].lstrip()
        plausible = any(key.startswith(start[: len(key)]) for key in _BARE_KEYS)
        end = self._finder.find(self._buffer) if plausible and self._finder else HOPELESS
        if end is None and not last:
            return False
        if end is not None and end != HOPELESS:
            calls = parse_calls("json", self._buffer[:end], self._specs)
            if calls and all(name in self._specs for name, _ in calls):
                self._take(calls, end, events)
                # Several are written with semicolons between.
                self._swallow = (";",)
                return True
        self._give_up(0, events)
        return True

    def _take(self, calls: list[Call], end: int, events: list[OutputEvent]) -> None:
        for name, arguments in calls:
            call_id = f"{self._call_id}{self._n_calls}"
            events.append(ToolCall(id=call_id, name=name, arguments=arguments))
            self._n_calls += 1
        self._buffer = self._buffer[end:]
        self._swallow = tuple(dict.fromkeys((self._syntax.closer, HERMES.closer)))
        self._skip_space = True
        self._space = ""
        self._state = _State.CONTENT

    def _give_up(self, n_read: int, events: list[OutputEvent]) -> None:
        """Let what looked like a call be content, with `n_read` characters of its body."""
        events.append(ContentDelta(self._space + self._syntax.opener + self._buffer[:n_read]))
        self._buffer = self._buffer[n_read:]
        self._space = ""
        self._fresh = False
        self._state = _State.CONTENT

    # --- the buffer -------------------------------------------------------------------------

    def _strip_space(self) -> bool:
        """Drop white space, and marks that mean nothing; False: more may be coming."""
        text = self._buffer.lstrip()
        for mark in self._swallow:
            if mark and text.startswith(mark):
                text = text.removeprefix(mark).lstrip()
                self._swallow = self._swallow[self._swallow.index(mark) + 1 :]
        self._buffer = text
        if any(mark.startswith(text) for mark in self._swallow) or not text:
            return False
        self._skip_space = False
        self._swallow = ()
        return True

    def _drop_all(self, *, last: bool) -> bool:
        """Wait for more; at the end, let the beginning of a mark be text."""
        if last and self._buffer:
            self._skip_space = False
            return True
        return False

    def _n_held(self, marks: Marks) -> int:
        """Return how much of the buffer's end may yet be a mark or the space before one."""
        if not marks:
            return 0
        text = self._buffer[: len(self._buffer) - marks.held(self._buffer)]
        return len(self._buffer) - len(text.rstrip())

    def _emit(
        self,
        kind: type[ThinkingDelta | ContentDelta],
        n_held: int,
        events: list[OutputEvent],
    ) -> None:
        n = len(self._buffer) - n_held
        events.append(kind(self._buffer[:n]))
        self._buffer = self._buffer[n:]
