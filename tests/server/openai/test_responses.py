"""The Responses API over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shimpy.chat.messages import ChatMessage, ToolCall
from shimpy.errors import InvalidOptionError
from shimpy.server.openai.responses.requests import parse_input
from shimpy.server.openai.responses.store import ResponseStore, StoredResponse
from shimpy.server.openai.responses.wire import (
    FormatBody,
    ItemBody,
    ReasoningConfig,
    Response,
    TextConfig,
)
from tests.server.harness import Running
from tests.server.openai.conftest import TIME, WEATHER, sse_events
from tests.synthetic import CHAIN_TEXT

pytestmark = pytest.mark.asyncio(loop_scope="package")

PATH = "/v1/responses"
TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]  # type: ignore[dict-item]


async def post(app: Running, **body: Any) -> dict[str, Any]:
    answer = await app.client.post(PATH, json={"model": "chain", "input": "x"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stream(app: Running, **body: Any) -> list[Any]:
    given = {"model": "chain", "input": "x", "stream": True} | body
    answer = await app.client.post(PATH, json=given)
    assert answer.status_code == 200, answer.text
    events = sse_events(answer.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    return events


async def test_a_whole_response(app: Running) -> None:
    response = await post(app, instructions="be nice", metadata={"a": "b"})
    (item,) = response["output"]
    assert response["object"] == "response"
    assert response["status"] == item["status"] == "completed"
    assert item["type"] == "message"
    assert item["content"] == [
        {"type": "output_text", "text": CHAIN_TEXT, "annotations": [], "logprobs": []}
    ]
    assert response["metadata"] == {"a": "b"}
    assert response["instructions"] == "be nice"
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    plain = await post(app)
    assert plain["usage"]["input_tokens"] < usage["input_tokens"]


async def test_the_events_of_a_text_in_their_order(app: Running) -> None:
    events = await stream(app)
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event["delta"] for event in events if event["type"].endswith("text.delta")]
    assert "".join(deltas) == events[-4]["text"] == CHAIN_TEXT
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == events[2]["item"]["content"] == []
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1


async def test_an_answer_that_was_cut_off_is_incomplete(app: Running) -> None:
    response = await post(app, max_output_tokens=2)
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (await stream(app, max_output_tokens=2))[-1]["type"] == "response.incomplete"


async def test_thoughts_and_calls_are_items_of_their_own(app: Running) -> None:
    response = await post(app, model="thinker")
    thought, message = response["output"]
    assert thought["type"] == "reasoning"
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hmm, rivers first."}]
    assert message["content"][0]["text"] == "The Rhine flows there."
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0

    events = await stream(app, model="caller", tools=TOOLS)
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[1]["name"] == "get_weather"
    assert msgspec.json.decode(output[1]["arguments"]) == {"city": "Köln"}
    done = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert [event["output_index"] for event in done] == [1, 2]
    assert [event["arguments"] for event in done] == [item["arguments"] for item in output[1:]]


async def test_a_call_goes_back_with_its_output(app: Running) -> None:
    first = await post(app, model="llama", tools=TOOLS, tool_choice="required", seed=1)
    (call,) = first["output"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "12 degrees"}
    by_id = await post(
        app, model="llama", input=[output], previous_response_id=first["id"], max_output_tokens=1
    )
    whole = [{"role": "user", "content": "x"}, call, output]
    by_hand = await post(app, model="llama", input=whole, max_output_tokens=1)
    assert by_id["usage"]["input_tokens"] == by_hand["usage"]["input_tokens"]


async def test_a_format_is_kept(app: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = await post(app, model="llama", text=text)
    value = msgspec.json.decode(response["output"][0]["content"][0]["text"])
    assert isinstance(value["a"], bool)
    assert response["text"]["format"]["name"] == "x"


async def test_logprobs_where_they_are_included(app: Running) -> None:
    response = await post(
        app, include=["message.output_text.logprobs"], top_logprobs=1, max_output_tokens=3
    )
    assert len(response["output"][0]["content"][0]["logprobs"]) == 3


# --- what is kept -----------------------------------------------------------------------------


async def test_a_response_goes_on_from_an_earlier_one(app: Running) -> None:
    first = await post(app, instructions="only here")
    second = await post(app, input="y", previous_response_id=first["id"])
    by_hand = await post(
        app,
        input=[
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": CHAIN_TEXT},
            {"role": "user", "content": "y"},
        ],
    )
    assert second["usage"]["input_tokens"] == by_hand["usage"]["input_tokens"]
    assert second["previous_response_id"] == first["id"]


async def test_responses_are_kept_until_they_are_deleted(app: Running) -> None:
    response = await post(app)
    path = f"{PATH}/{response['id']}"
    assert (await app.client.get(path)).json() == response
    assert (await app.client.delete(path)).json()["deleted"] is True
    for answer in (await app.client.get(path), await app.client.delete(path)):
        assert answer.status_code == 404
        assert response["id"] in answer.json()["error"]["message"]
    unkept = await post(app, store=False)
    assert (await app.client.get(f"{PATH}/{unkept['id']}")).status_code == 404


def _stored(response_id: str, n_chars: int) -> StoredResponse:
    response = Response(
        id=response_id,
        created_at=0,
        status="completed",
        instructions=None,
        max_output_tokens=None,
        metadata={},
        model="m",
        parallel_tool_calls=True,
        previous_response_id=None,
        reasoning=ReasoningConfig(effort=None),
        store=True,
        temperature=None,
        text=TextConfig(format=FormatBody(type="text")),
        tool_choice="auto",
        tools=[],
        top_p=None,
        truncation="disabled",
    )
    return StoredResponse(response=response, messages=(), n_chars=n_chars)


async def test_the_store_is_bounded_in_number_and_size() -> None:
    store = ResponseStore(max_responses=3, max_chars=100)
    for name in "abc":
        store.add(_stored(name, 10))
    # Used again, a outlives b.
    store.get("a")
    store.add(_stored("d", 10))
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    store.add(_stored("e", 85))
    assert [name for name in "acde" if store.get(name)] == ["d", "e"]
    store.add(_stored("f", 101))
    assert [name for name in "def" if store.get(name)] == []
    with pytest.raises(InvalidOptionError, match="'e' not found"):
        store.conversation("e")


# --- the input --------------------------------------------------------------------------------


async def test_items_of_one_turn_become_one_message() -> None:
    items = [
        ItemBody(role="user", content="weather?"),
        ItemBody(type="reasoning", summary=[]),
        ItemBody(type="message", role="assistant", content="I look."),
        ItemBody(type="function_call", call_id="1", name="f", arguments='{"a": 1}'),
        ItemBody(type="function_call", call_id="2", name="g", arguments=""),
        ItemBody(type="function_call_output", call_id="1", output="one"),
        ItemBody(type="message", role="assistant", content="Sun."),
        ItemBody(type="message", role="assistant", content="And wind."),
    ]
    calls = (
        ToolCall(id="1", name="f", arguments={"a": 1}),
        ToolCall(id="2", name="g", arguments={}),
    )
    assert parse_input(items) == [
        ChatMessage(role="user", content="weather?"),
        ChatMessage(role="assistant", content="I look.", tool_calls=calls),
        ChatMessage(role="tool", content="one", tool_call_id="1"),
        ChatMessage(role="assistant", content="Sun."),
        ChatMessage(role="assistant", content="And wind."),
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": None}, "input is required"),
        ({"input": []}, "input is required"),
        ({"input": [{"type": "item_reference"}]}, "item_reference"),
        ({"input": [{"role": "boss", "content": "x"}]}, "role"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "?"}]}, "arguments"),
        ({"previous_response_id": "resp_x"}, "'resp_x' not found"),
        ({"background": True}, "background is not supported"),
        ({"conversation": "c"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "get_weather"),
        ({"truncation": "some"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
        ({"model": "bert"}, "does not support chat"),
    ],
)
async def test_errors_name_what_is_wrong(app: Running, body: dict[str, Any], words: str) -> None:
    answer = await app.client.post(PATH, json={"model": "chain", "input": "x"} | body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


async def test_a_long_conversation_may_be_cut(app: Running) -> None:
    long = "word " * 4000
    refused = await app.client.post(PATH, json={"model": "chain", "input": long})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert (await post(app, input=long, truncation="auto"))["status"] == "completed"
