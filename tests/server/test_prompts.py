"""Which requests are made ready on the event loop, and which in a thread."""

from __future__ import annotations

import pytest

from shimpy.chat.messages import ChatMessage, ToolSpec
from shimpy.server.prompts import is_short
from shimpy.server.requests import ChatPrompt, GapPrompt, GenerationRequest, PlainPrompt, Prompt

HELLO = ChatMessage(role="user", content="hello")
TOOL = ToolSpec(name="look", description="", parameters={})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PlainPrompt(text="x" * 1_000_000), True),
        (ChatPrompt(messages=(HELLO,) * 9), True),
        (ChatPrompt(messages=(HELLO,) * 90), False),
        (ChatPrompt(messages=(ChatMessage(role="user", content="x" * 9000),)), False),
        (ChatPrompt(messages=(HELLO,), tools=(TOOL,)), False),
        (ChatPrompt(messages=(HELLO,), template="{{ messages }}"), False),
        (GapPrompt(prefix="a", suffix="b"), False),
    ],
)
def test_only_what_takes_no_time_is_short(prompt: Prompt, expected: bool) -> None:
    assert is_short(GenerationRequest(model="m", prompt=prompt)) is expected


def test_a_schema_is_compiled_in_a_thread() -> None:
    prompt = PlainPrompt(text="x")
    assert not is_short(GenerationRequest(model="m", prompt=prompt, output_format="json"))
