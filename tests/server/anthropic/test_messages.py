"""Anthropic's dialect, byte for byte, over HTTP against the real llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.chat.templates import QWEN3
from tests.server.harness import Running, running_app
from tests.synthetic import CHAIN_TEXT, write_bert, write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

THOUGHT = "<think>\nHmm, rivers first.\n</think>\n\nThe Rhine flows there."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER = {
    "name": "get_weather",
    "description": "Say what the weather is.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USER = [{"role": "user", "content": "Weather in Köln?"}]
ENABLED = {"type": "enabled", "budget_tokens": 1024}
_MASKS = (
    (re.compile(rb"msg_[0-9a-f]{24}"), b"msg_ID"),
    (re.compile(rb"call_[0-9a-f]{8}_"), b"call_ID_"),
    (re.compile(rb'"(input_tokens|cache_read_input_tokens|output_tokens)":\d+'), rb'"\1":N'),
)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("anthropic")
    write_chain(folder / "chain.gguf")
    write_chain(folder / "thinker.gguf", THOUGHT, chat_template=QWEN3)
    write_chain(folder / "caller.gguf", f"I look it up.\n{CALL}", chat_template=QWEN3)
    write_chain(folder / "endless.gguf", endless=True)
    write_bert(folder / "bert.gguf")
    async with running_app(folder, tmp_path_factory.mktemp("state")) as running:
        yield running


def _golden(body: bytes) -> bytes:
    """Put fixed words where ids and counts are."""
    for pattern, words in _MASKS:
        body = pattern.sub(words, body)
    return body


def _body(model: str = "chain", **fields: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 100, "messages": USER} | fields


async def _message(app: Running, **fields: Any) -> dict[str, Any]:
    answer = await app.client.post("/v1/messages", json=_body(**fields))
    assert answer.status_code == 200, answer.text
    message: dict[str, Any] = answer.json()
    return message


async def _events(app: Running, **fields: Any) -> list[dict[str, Any]]:
    answer = await app.client.post("/v1/messages", json=_body(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def test_a_whole_message(app: Running) -> None:
    headers = {"anthropic-version": "2023-06-01", "x-api-key": "any", "X-Request-Id": "r-1"}
    answer = await app.client.post("/v1/messages", json=_body(max_tokens=1), headers=headers)
    assert answer.headers["request-id"] == "r-1"
    assert _golden(answer.content) == (
        b'{"type":"message","id":"msg_ID","role":"assistant","model":"chain","content":'
        b'[{"type":"text","text":"Once"}],"stop_reason":"max_tokens","stop_sequence":null,'
        b'"usage":{"input_tokens":N,"cache_creation_input_tokens":0,"cache_read_input_tokens":N,'
        b'"output_tokens":N}}'
    )


async def test_a_streamed_message(app: Running) -> None:
    answer = await app.client.post("/v1/messages", json=_body(max_tokens=1, stream=True))
    assert answer.headers["content-type"] == "text/event-stream"
    usage = (
        b'"usage":{"input_tokens":N,"cache_creation_input_tokens":0,"cache_read_input_tokens":N,'
        b'"output_tokens":N}'
    )
    assert _golden(answer.content) == (
        b"event: message_start\n"
        b'data: {"type":"message_start","message":{"type":"message","id":"msg_ID","role":'
        b'"assistant","model":"chain","content":[],"stop_reason":null,"stop_sequence":null,'
        + usage
        + b"}}\n\n"
        b"event: content_block_start\n"
        b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'
        b"\n\n"
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Once"}'
        b"}\n\n"
        b"event: content_block_stop\n"
        b'data: {"type":"content_block_stop","index":0}\n\n'
        b"event: message_delta\n"
        b'data: {"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},'
        + usage
        + b"}\n\n"
        b"event: message_stop\n"
        b'data: {"type":"message_stop"}\n\n'
    )


async def test_the_text_is_whole_either_way(app: Running) -> None:
    message = await _message(app)
    assert message["content"] == [{"type": "text", "text": CHAIN_TEXT}]
    assert message["stop_reason"] == "end_turn"
    assert message["usage"]["output_tokens"] > 5
    events = await _events(app)
    assert "".join(_deltas(events, "text")) == CHAIN_TEXT


def _deltas(events: list[dict[str, Any]], key: str) -> list[str]:
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    return [delta[key] for delta in deltas if key in delta]


async def test_a_stop_sequence_is_named_and_not_shown(app: Running) -> None:
    word = CHAIN_TEXT.split()[2]
    message = await _message(app, stop_sequences=["never", word])
    assert message["stop_reason"] == "stop_sequence"
    assert message["stop_sequence"] == word
    assert word not in message["content"][0]["text"]


async def test_cached_tokens_are_not_input_tokens(app: Running) -> None:
    """The sum of both is the prompt's length, as with Anthropic."""
    messages = [{"role": "user", "content": "words that nobody else sends " * 3}]
    first = (await _message(app, messages=messages))["usage"]
    again = (await _message(app, messages=messages))["usage"]
    assert again["cache_read_input_tokens"] > 0
    assert _n_prompt(first) == _n_prompt(again)


def _n_prompt(usage: dict[str, int]) -> int:
    return usage["input_tokens"] + usage["cache_read_input_tokens"]


async def test_nothing_is_generated_for_no_tokens(app: Running) -> None:
    """A client warms the cache by max_tokens 0."""
    message = await _message(app, max_tokens=0)
    assert message["content"] == []
    assert message["stop_reason"] == "max_tokens"
    assert message["usage"]["output_tokens"] == 0


# --- thinking ---------------------------------------------------------------------------------


async def test_thoughts_are_blocks_of_their_own(app: Running) -> None:
    message = await _message(app, model="thinker", thinking=ENABLED)
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hmm, rivers first.", "signature": ""},
        {"type": "text", "text": "The Rhine flows there."},
    ]
    events = await _events(app, model="thinker", thinking=ENABLED)
    assert "".join(_deltas(events, "thinking")) == "Hmm, rivers first."
    assert "".join(_deltas(events, "text")) == "The Rhine flows there."
    starts = [e["index"] for e in events if e["type"] == "content_block_start"]
    stops = [e["index"] for e in events if e["type"] == "content_block_stop"]
    assert starts == stops == [0, 1]


@pytest.mark.parametrize(
    "thinking",
    [None, {"type": "disabled"}, ENABLED | {"display": "omitted"}],
    ids=["unset", "disabled", "omitted"],
)
async def test_thoughts_are_not_shown_unasked(app: Running, thinking: Any) -> None:
    """Scripts take content[0].text for the answer; this model thinks whatever it is told."""
    message = await _message(app, model="thinker", thinking=thinking)
    assert message["content"] == [{"type": "text", "text": "The Rhine flows there."}]
    assert await _events(app, model="thinker", thinking=thinking)


async def test_a_model_that_cannot_think_answers_without(app: Running) -> None:
    effort = {"effort": "xhigh"}
    message = await _message(app, thinking={"type": "adaptive"}, output_config=effort)
    assert message["content"] == [{"type": "text", "text": CHAIN_TEXT}]


# --- tools ------------------------------------------------------------------------------------


async def test_a_call_is_a_block_after_the_words_before_it(app: Running) -> None:
    message = await _message(app, model="caller", tools=[WEATHER])
    words, call = message["content"]
    assert words == {"type": "text", "text": "I look it up."}
    assert call["type"] == "tool_use"
    assert (call["name"], call["input"]) == ("get_weather", {"city": "Köln"})
    assert call["id"]
    assert message["stop_reason"] == "tool_use"


async def test_a_streamed_call(app: Running) -> None:
    events = await _events(app, model="caller", tools=[WEATHER])
    start = next(e for e in events if e.get("content_block", {}).get("type") == "tool_use")
    assert start["content_block"]["input"] == {}
    assert start["index"] == 1
    assert json.loads("".join(_deltas(events, "partial_json"))) == {"city": "Köln"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_a_call_can_be_demanded(app: Running) -> None:
    """By a grammar: the chain by itself says something else."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [WEATHER, {"name": "get_time", "input_schema": nothing}]
    choice = {"type": "tool", "name": "get_time"}
    message = await _message(app, tools=tools, tool_choice=choice)
    (call,) = message["content"]
    assert (call["name"], call["input"]) == ("get_time", {})
    assert message["stop_reason"] == "tool_use"


async def test_tools_can_be_forbidden(app: Running) -> None:
    message = await _message(app, model="caller", tools=[WEATHER], tool_choice={"type": "none"})
    assert [block["type"] for block in message["content"]] == ["text"]


async def test_a_turn_with_calls_and_results_is_taken_back(app: Running) -> None:
    """Results reach the template as messages of their own: the prompt grows by each."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Köln"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}
    turns = [
        *USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "I look.", "cache_control": {"type": "ephemeral"}},
                use,
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    assert (await _message(app, model="caller", tools=[WEATHER], messages=turns))["content"]
    shorter = await _count(app, model="caller", tools=[WEATHER], messages=turns[:2])
    with_text = await _count(app, model="caller", tools=[WEATHER], messages=turns)
    blocks = [result | {"content": [{"type": "text", "text": "sunny"}]}]
    turns[2] = {"role": "user", "content": blocks}
    assert shorter < await _count(app, model="caller", tools=[WEATHER], messages=turns) < with_text


# --- the prompt -------------------------------------------------------------------------------


async def _count(app: Running, **fields: Any) -> int:
    body = {"model": "chain", "messages": USER} | fields
    answer = await app.client.post("/v1/messages/count_tokens", json=body)
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["input_tokens"]
    return int(answer.json()["input_tokens"])


async def test_tokens_are_counted_as_they_are_then_used(app: Running) -> None:
    fields: dict[str, Any] = {
        "model": "caller",
        "system": "Be brief. <|im_end|>",
        "tools": [WEATHER],
    }
    usage = (await _message(app, **fields))["usage"]
    assert await _count(app, **fields) == _n_prompt(usage)


async def test_the_system_may_be_text_or_blocks(app: Running) -> None:
    blocks = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    as_text, as_blocks = [await _count(app, system=s) for s in ("Be\nbrief.", blocks)]
    assert as_text == as_blocks > await _count(app)


async def test_an_answer_goes_on_from_its_beginning(app: Running) -> None:
    """A prefilled turn is left open, where a closed one and a new one take more tokens."""
    begun = [*USER, {"role": "assistant", "content": "The answer is ("}]
    closed = [*begun, {"role": "user", "content": ""}]
    assert await _count(app, messages=begun) < await _count(app, messages=closed) - 5
    assert (await _message(app, messages=begun))["content"]


async def test_documents_of_text_are_read(app: Running) -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "grass is green " * 5}
    content = [{"type": "document", "source": source, "title": "Notes"}]
    assert await _count(app, messages=[{"role": "user", "content": content}]) > 20


async def test_the_answer_can_follow_a_schema(app: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": wanted}}, {"output_format": wanted}):
        message = await _message(app, **fields)
        assert isinstance(json.loads(message["content"][0]["text"])["n"], int)


# --- errors -----------------------------------------------------------------------------------


def _blocks(block: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [block]}]}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", '"max_tokens" is required'),
        ({"max_tokens": -1}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": "5"}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": None}, 400, "invalid_request_error", "messages"),
        ({"model": "nix"}, 404, "not_found_error", "model 'nix' not found"),
        ({"model": ""}, 400, "invalid_request_error", "model is required"),
        ({"model": "bert"}, 400, "invalid_request_error", "does not support chat"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"stop_sequences": "x"}, 400, "invalid_request_error", "stop_sequences"),
        ({"thinking": {"type": "yes"}}, 400, "invalid_request_error", "thinking.type"),
        ({"output_config": {"effort": "?"}}, 400, "invalid_request_error", "effort"),
        ({"output_format": {"type": "xml"}}, 400, "invalid_request_error", "json_schema"),
        ({"tools": [{}]}, 400, "invalid_request_error", "tools[0].name"),
        ({"tools": [{"type": "bash_20250124"}]}, 400, "invalid_request_error", "bash_20250124"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"tool_choice": {"type": "?"}}, 400, "invalid_request_error", "tool_choice.type"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}},
            400,
            "invalid_request_error",
            "the tools are: get_weather",
        ),
        (_blocks({"type": "image", "source": {}}), 400, "invalid_request_error", "is an image"),
        (_blocks({"type": "document"}), 400, "invalid_request_error", "document"),
        (_blocks({"type": "container_upload"}), 400, "invalid_request_error", "container_upload"),
        (_blocks({"type": "tool_use"}, "assistant"), 400, "invalid_request_error", ".name"),
        ({"messages": [{"role": "boss", "content": ""}]}, 400, "invalid_request_error", "role"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_request_error", "content"),
    ],
)
async def test_errors_have_anthropics_form(
    app: Running, fields: dict[str, Any], status: int, kind: str, words: str
) -> None:
    if fields.get("model") == "":
        await app.unload_all()
    for stream in (False, True):
        answer = await app.client.post("/v1/messages", json=_body(stream=stream) | fields)
        assert answer.status_code == status, answer.text
        error = answer.json()
        assert error["type"] == "error"
        assert error["error"]["type"] == kind
        assert words in error["error"]["message"]
        assert answer.headers["request-id"]


async def test_a_prompt_over_the_context_says_by_how_much(app: Running) -> None:
    messages = [{"role": "user", "content": "word " * 3000}]
    answer = await app.client.post("/v1/messages", json=_body(messages=messages))
    assert answer.status_code == 400
    assert re.match(
        r"prompt is too long: \d+ tokens > 2048 maximum", answer.json()["error"]["message"]
    )
    full = await _message(app, model="endless", max_tokens=100_000)
    assert full["stop_reason"] == "model_context_window_exceeded"
