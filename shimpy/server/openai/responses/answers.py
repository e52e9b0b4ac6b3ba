"""Events of a generation as those of a response: a state machine with no I/O of its own.

(none) --text--> message --text--> message ...
  |  ^             |
  |  '--- done ----'     an item is done when text of another kind, a call or the end comes
  '--thought--> reasoning, likewise; a call is an item that comes whole
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

import msgspec

from shimpy.chat.messages import ChatMessage, ToolCall
from shimpy.errors import ShimpyError
from shimpy.protocol.messages import TokenLogprob
from shimpy.server.errors import openai_error
from shimpy.server.events import (
    ContentDelta,
    Event,
    Finished,
    Started,
    ThinkingDelta,
    ToolCallMade,
)
from shimpy.server.openai.answers import new_id, now_s
from shimpy.server.openai.chat import json_text, shown_logprobs
from shimpy.server.openai.responses.wire import (
    CallItem,
    Incomplete,
    InputDetails,
    Item,
    MessageItem,
    OutputDetails,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    StreamEvent,
    Usage,
)


class ResponseBuilder:
    """Puts one response together and says what happens to it."""

    def __init__(self, response: Response) -> None:
        # As it is now; replaced, never changed.
        self.response = response
        self._n_events = 0
        self._open: _OpenText | None = None
        self._calls: list[ToolCall] = []

    def take(self, event: Event) -> list[StreamEvent]:
        """Return what an event of the generation means for the response."""
        match event:
            case Started():
                return [
                    self._event("response.created", response=self.response),
                    self._event("response.in_progress", response=self.response),
                ]
            case ContentDelta():
                return [*self._enter("message"), self._text(event.text, event.logprobs)]
            case ThinkingDelta():
                return [*self._enter("reasoning"), self._text(event.text, ())]
            case ToolCallMade():
                return [*self._close(), *self._call(event.call)]
            case Finished():
                return [*self._close(event), self._finish(event)]
            case _:
                assert_never(event)

    def failed(self, error: ShimpyError) -> StreamEvent:
        """Return the event that ends the stream after a failure."""
        body = openai_error(error)["error"]
        return self._event(
            "error",
            code=body["code"],
            message=body["message"],
            param=body["param"],
            error=body,
        )

    def message(self) -> ChatMessage:
        """Return the output as the assistant's turn."""
        texts = [item for item in self.response.output if isinstance(item, MessageItem)]
        thoughts = [item for item in self.response.output if isinstance(item, ReasoningItem)]
        return ChatMessage(
            role="assistant",
            content="".join(part.text for item in texts for part in item.content),
            thinking="".join(part.text for item in thoughts for part in item.content),
            tool_calls=tuple(self._calls),
        )

    # --- texts --------------------------------------------------------------------------------

    def _enter(self, kind: str) -> list[StreamEvent]:
        """Begin an item of text, unless such a one is open."""
        if self._open is not None and self._open.kind == kind:
            return []
        events = self._close()
        self._open = opened = _OpenText(kind)
        events.append(self._item_event("added", opened.item("in_progress", with_text=False)))
        events.append(self._part_event("added", opened, opened.part(text="")))
        return events

    def _text(self, text: str, logprobs: Sequence[TokenLogprob]) -> StreamEvent:
        opened = self._open
        assert opened is not None, "an item of text was entered"
        shown = opened.add(text, logprobs)
        extra = {"logprobs": shown} if opened.kind == "message" else {}
        return self._in_open(f"{opened.event}.delta", opened, delta=text, **extra)

    def _close(self, finished: Finished | None = None) -> list[StreamEvent]:
        """End the item of text that is open; `finished` where the whole answer ends with it."""
        opened, self._open = self._open, None
        if opened is None:
            return []
        is_cut = finished is not None and finished.reason == "length"
        part = opened.part()
        extra = {"logprobs": part.logprobs} if isinstance(part, OutputText) else {}
        item = opened.item("incomplete" if is_cut else "completed")
        events = [
            self._in_open(f"{opened.event}.done", opened, text=part.text, **extra),
            self._part_event("done", opened, part),
            self._item_event("done", item),
        ]
        self._add(item)
        return events

    # --- calls and the end --------------------------------------------------------------------

    def _call(self, call: ToolCall) -> list[StreamEvent]:
        self._calls.append(call)
        item = CallItem(
            id=new_id("fc_"),
            status="completed",
            call_id=call.id,
            name=call.name,
            arguments=json_text(call.arguments),
        )
        begun = msgspec.structs.replace(item, status="in_progress", arguments="")
        at: dict[str, Any] = {"item_id": item.id, "output_index": self._n_items}
        name = "response.function_call_arguments"
        events = [
            self._item_event("added", begun),
            self._event(f"{name}.delta", delta=item.arguments, **at),
            self._event(f"{name}.done", name=item.name, arguments=item.arguments, **at),
            self._item_event("done", item),
        ]
        self._add(item)
        return events

    def _finish(self, event: Finished) -> StreamEvent:
        is_cut = event.reason == "length"
        self.response = msgspec.structs.replace(
            self.response,
            status="incomplete" if is_cut else "completed",
            completed_at=None if is_cut else now_s(),
            incomplete_details=Incomplete() if is_cut else None,
            usage=Usage(
                input_tokens=event.n_prompt,
                input_tokens_details=InputDetails(cached_tokens=event.n_cached),
                output_tokens=event.n_generated,
                output_tokens_details=OutputDetails(reasoning_tokens=event.n_thinking),
                total_tokens=event.n_prompt + event.n_generated,
            ),
        )
        return self._event(f"response.{self.response.status}", response=self.response)

    # --- events -------------------------------------------------------------------------------

    @property
    def _n_items(self) -> int:
        return len(self.response.output)

    def _add(self, item: Item) -> None:
        output = [*self.response.output, item]
        self.response = msgspec.structs.replace(self.response, output=output)

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        self._n_events += 1
        return StreamEvent(type=kind, sequence_number=self._n_events - 1, **fields)

    def _item_event(self, what: str, item: Item) -> StreamEvent:
        return self._event(f"response.output_item.{what}", output_index=self._n_items, item=item)

    def _part_event(
        self, what: str, opened: _OpenText, part: OutputText | ReasoningText
    ) -> StreamEvent:
        return self._in_open(f"response.content_part.{what}", opened, part=part)

    def _in_open(self, kind: str, opened: _OpenText, **fields: Any) -> StreamEvent:
        return self._event(
            kind, item_id=opened.id, output_index=self._n_items, content_index=0, **fields
        )


class _OpenText:
    """A message or a thought that is being written."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.id = new_id("msg_" if kind == "message" else "rs_")
        self.event = "response.output_text" if kind == "message" else "response.reasoning_text"
        self._texts: list[str] = []
        self._logprobs: list[Any] = []

    def add(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Any]:
        self._texts.append(text)
        found = shown_logprobs(logprobs)
        shown: list[Any] = [] if found is None else list(found.content)
        self._logprobs += shown
        return shown

    def part(self, text: str | None = None) -> OutputText | ReasoningText:
        written = "".join(self._texts) if text is None else text
        if self.kind == "message":
            return OutputText(text=written, logprobs=list(self._logprobs))
        return ReasoningText(text=written)

    def item(self, status: Any, *, with_text: bool = True) -> Item:
        parts: list[Any] = [self.part()] if with_text else []
        cls = MessageItem if self.kind == "message" else ReasoningItem
        return cls(id=self.id, status=status, content=parts)
