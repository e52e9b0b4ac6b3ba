"""OpenAI's own SDK against a real daemon: only its base URL is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.clients.conftest import ENDLESS_CTX, kill_endless
from tests.synthetic import CHAIN_TEXT

pytestmark = pytest.mark.clients

USER: Any = [{"role": "user", "content": "Weather in Köln?"}]
FUNCTION: Any = {
    "name": "get_weather",
    "description": "Say what the weather is.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]


class Pair(pydantic.BaseModel):
    a: int
    b: bool


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


# --- chat completions -------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="chain", messages=USER, extra_body={"keep_alive": "10m"}
    )
    (choice,) = whole.choices
    assert choice.message.content == CHAIN_TEXT
    assert choice.finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_streamed_chat_with_its_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="chain",
            messages=USER,
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=4,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text
    assert CHAIN_TEXT.startswith(text)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_several_choices(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="chain", messages=USER, n=3)
    assert [choice.message.content for choice in whole.choices] == [CHAIN_TEXT] * 3


def test_logprobs(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="chain", messages=USER, logprobs=True, top_logprobs=2, max_tokens=2
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert [len(one.top_logprobs) for one in logprobs.content or []] == [2, 2]


def test_a_schema_is_parsed(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="llama", messages=USER, response_format=Pair)
    assert isinstance(parsed.choices[0].message.parsed, Pair)
    with client.chat.completions.stream(
        model="llama", messages=USER, response_format=Pair
    ) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Pair)


def test_an_answer_that_was_cut_off_raises_where_it_is_parsed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="llama", messages=USER, response_format=Pair, max_tokens=2
        )


def test_a_tool_is_called_and_answered(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="caller", messages=USER, tools=TOOLS)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look it up."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    follow_up = client.chat.completions.create(
        model="chain", messages=[*USER, choice.message, result], tools=TOOLS
    )
    assert follow_up.choices[0].message.content == CHAIN_TEXT


def test_a_streamed_call_is_put_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="llama",
        messages=USER,
        tools=[openai.pydantic_function_tool(Pair)],
        tool_choice="required",
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Pair)


async def test_the_async_client(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        stream = await client.chat.completions.create(model="chain", messages=USER, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == CHAIN_TEXT


# --- completions, embeddings, models ----------------------------------------------------------


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="chain", prompt=["a", "b"], echo=True, stop="fox")
    said = CHAIN_TEXT.partition("fox")[0]
    assert [choice.text for choice in whole.choices] == [f"a{said}", f"b{said}"]
    filled = client.completions.create(model="chain", prompt="def f(", suffix="return")
    assert filled.choices[0].text == CHAIN_TEXT
    streamed = client.completions.create(model="chain", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == CHAIN_TEXT


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_embeddings(client: openai.OpenAI, model: str) -> None:
    """The SDK asks for base64 by itself."""
    packed = client.embeddings.create(model=model, input=["a b", "c"])
    assert len(packed.data) == 2
    assert math.hypot(*packed.data[0].embedding) == pytest.approx(1)
    plain = client.embeddings.create(model=model, input="a b", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(packed.data[0].embedding, abs=2e-3)
    short = client.embeddings.create(model=model, input="a b", dimensions=8)
    assert len(short.data[0].embedding) == 8


def test_models(client: openai.OpenAI) -> None:
    assert "chain:latest" in {model.id for model in client.models.list()}
    assert client.models.retrieve("chain").id == "chain"


# --- responses --------------------------------------------------------------------------------


def test_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model="chain", input="hi", instructions="Be brief.")
    assert first.output_text == CHAIN_TEXT
    assert first.status == "completed"
    second = client.responses.create(model="chain", input="on", previous_response_id=first.id)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == CHAIN_TEXT
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.create(model="chain", input="on", previous_response_id=first.id)


def test_a_streamed_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="thinker", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output_text == "The Rhine flows there."


def test_a_response_by_schema(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="llama", input="x", text_format=Pair)
    assert isinstance(parsed.output_parsed, Pair)


def test_a_call_in_a_response_is_answered(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **FUNCTION}
    with client.responses.stream(
        model="llama", input="x", tools=[tool], tool_choice="required"
    ) as stream:
        stream.until_done()
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"city"}
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [{"role": "user", "content": "x"}, call, output]
    answer = client.responses.create(model="llama", input=items, max_output_tokens=3)
    assert answer.status == "incomplete"


# --- errors -----------------------------------------------------------------------------------


def test_errors_are_of_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"nix.* not found") as missing:
        client.chat.completions.create(model="nix", messages=USER)
    assert missing.value.type == "not_found_error"
    with pytest.raises(openai.BadRequestError, match="too short"):
        client.chat.completions.create(model="chain", messages=[])
    with pytest.raises(openai.BadRequestError) as over:
        client.chat.completions.create(
            model="chain", messages=[{"role": "user", "content": "word " * 4000}]
        )
    assert over.value.code == "context_length_exceeded"


@pytest.mark.parametrize("api", ["chat", "completions", "responses"])
def test_a_killed_worker_is_an_error_in_the_stream(
    client: openai.OpenAI, url: str, api: str
) -> None:
    options: Any = {"extra_body": {"options": {"num_ctx": ENDLESS_CTX}}, "stream": True}
    match api:
        case "chat":
            stream: Any = client.chat.completions.create(model="endless", messages=USER, **options)
        case "completions":
            stream = client.completions.create(model="endless", prompt="x", **options)
        case _:
            stream = client.responses.create(model="endless", input="x", **options)
    next(stream)
    kill_endless(url)
    with pytest.raises(openai.APIError, match="worker"):
        list(stream)
    again = client.completions.create(model="endless", prompt="x", max_tokens=3)
    assert again.choices[0].finish_reason == "length"
