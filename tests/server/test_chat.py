"""Thinking and tool calls over HTTP, by models that say a known text in a real family's format."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.chat.templates import QWEN3
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Say what the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
)
USER = [{"role": "user", "content": "Weather in Köln?"}]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("chat")
    thought = "<think>\nHmm, rivers first.\n</think>\n\nThe Rhine flows there."
    write_chain(folder / "thinker.gguf", thought, chat_template=QWEN3)
    write_chain(folder / "caller.gguf", f"I look it up.\n{CALL}", chat_template=QWEN3)
    async with running_app(folder, folder) as running:
        yield running


async def test_thoughts_are_streamed_apart_from_the_answer(app: Running) -> None:
    lines = await app.lines("/api/chat", {"model": "thinker", "messages": USER})
    thinking = "".join(line["message"].get("thinking", "") for line in lines)
    content = "".join(line["message"]["content"] for line in lines)
    assert thinking == "Hmm, rivers first."
    assert content == "The Rhine flows there."


async def test_thoughts_are_apart_in_a_whole_answer(app: Running) -> None:
    body = {"model": "thinker", "prompt": "x", "stream": False, "think": True}
    answer = (await app.client.post("/api/generate", json=body)).json()
    assert answer["thinking"] == "Hmm, rivers first."
    assert answer["response"] == "The Rhine flows there."


async def test_think_reaches_the_template(app: Running) -> None:
    """Qwen's template writes an empty thought where there is to be none."""
    counts = {}
    for think in (True, False):
        body: dict[str, Any] = {"model": "thinker", "messages": USER, "stream": False}
        answer = await app.client.post("/api/chat", json=body | {"think": think})
        counts[think] = answer.json()["prompt_eval_count"]
    assert counts[False] > counts[True]


async def test_a_tool_call_is_an_object_after_the_words_before_it(app: Running) -> None:
    body = {"model": "caller", "messages": USER, "tools": [WEATHER], "think": False}
    lines = await app.lines("/api/chat", body)
    content = "".join(line["message"]["content"] for line in lines)
    calls = [call for line in lines for call in line["message"].get("tool_calls", [])]
    assert content == "I look it up."
    assert len(calls) == 1
    assert calls[0]["function"] == {
        "index": 0,
        "name": "get_weather",
        "arguments": {"city": "Köln", "days": 2},
    }
    assert calls[0]["id"]
    assert lines[-1]["done_reason"] == "stop"
    whole = await app.client.post("/api/chat", json=body | {"stream": False})
    message = whole.json()["message"]
    assert message["content"] == "I look it up."
    assert [call["function"] for call in message["tool_calls"]] == [calls[0]["function"]]


async def test_without_tools_a_call_is_just_text(app: Running) -> None:
    body = {"model": "caller", "messages": USER, "stream": False, "think": False}
    message = (await app.client.post("/api/chat", json=body)).json()["message"]
    assert message["content"] == f"I look it up.\n{CALL}"
    assert "tool_calls" not in message


async def test_show_tells_the_capabilities(app: Running) -> None:
    shown = (await app.client.post("/api/show", json={"model": "thinker"})).json()
    assert {"completion", "tools", "thinking"} <= set(shown["capabilities"])


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ({"type": "retrieval", "function": {"name": "f"}}, "tools[0].type"),
        ({"type": "function", "function": {"name": ""}}, "tools[0].function.name"),
        ({"type": "function"}, "tools[0].function"),
        ({"type": "function", "function": {"name": "f", "parameters": []}}, "parameters"),
    ],
)
async def test_a_bad_tool_is_named(app: Running, tool: dict[str, Any], words: str) -> None:
    body = {"model": "caller", "messages": USER, "tools": [tool]}
    answer = await app.client.post("/api/chat", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]
