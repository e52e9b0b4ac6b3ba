"""Anthropic's own SDK against a real daemon: only its base URL is changed."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pydantic
import pytest

from tests.clients.conftest import ENDLESS_CTX, kill_endless
from tests.daemon import Daemon
from tests.synthetic import CHAIN_TEXT

pytestmark = pytest.mark.clients

WEATHER: anthropic.types.ToolParam = {
    "name": "get_weather",
    "description": "Say what the weather is.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USER: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Weather in Köln?"}]


class Answer(pydantic.BaseModel):
    n: int


@pytest.fixture(scope="module")
def url(daemon: Daemon) -> str:
    return daemon.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as made:
        yield made


def _text(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_create(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model="chain",
        max_tokens=100,
        messages=USER,
        system="Be brief.",
        metadata={"user_id": "someone"},
        # This SDK has dropped the sampling options; older ones send them.
        extra_body={"temperature": 0.5, "top_k": 20, "keep_alive": "1h"},
    )
    assert _text(message) == CHAIN_TEXT
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_create_as_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.create(
        model="chain", max_tokens=100, messages=USER, stream=True
    ) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    # Text that waits for a slow reader runs together.
    assert "content_block_delta" in kinds


def test_the_streaming_helper_puts_the_message_together(client: anthropic.Anthropic) -> None:
    with client.messages.stream(
        model="thinker",
        max_tokens=1100,
        messages=USER,
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "The Rhine flows there."
    thought, answer = message.content
    assert thought.type == "thinking"
    assert thought.thinking == "Rivers first."
    assert answer.type == "text"
    assert message.usage.output_tokens > 0


@pytest.mark.asyncio
async def test_the_async_client(url: str) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=url, api_key="any") as client,
        client.messages.stream(
            model="chain", max_tokens=100, messages=USER, stop_sequences=["upon"]
        ) as stream,
    ):
        message = await stream.get_final_message()
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == "upon"


def test_a_tool_is_called_and_its_result_taken(client: anthropic.Anthropic) -> None:
    first = client.messages.create(model="caller", max_tokens=100, messages=USER, tools=[WEATHER])
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert call.input == {"city": "Köln"}
    result: anthropic.types.ToolResultBlockParam = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": "sunny",
    }
    turns: list[anthropic.types.MessageParam] = [
        *USER,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(model="caller", max_tokens=100, messages=turns, tools=[WEATHER])
    assert second.usage.input_tokens + (second.usage.cache_read_input_tokens or 0) > (
        first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    )


def test_a_streamed_call(client: anthropic.Anthropic) -> None:
    with client.messages.stream(
        model="caller", max_tokens=100, messages=USER, tools=[WEATHER]
    ) as stream:
        message = stream.get_final_message()
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("get_weather", {"city": "Köln"})


def test_parse_gives_the_schemas_own_type(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(
        model="chain", max_tokens=100, messages=USER, output_format=Answer
    )
    assert isinstance(message.parsed_output, Answer)


def test_count_tokens(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="chain", messages=USER, system="Be brief.")
    message = client.messages.create(model="chain", max_tokens=1, messages=USER, system="Be brief.")
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_models(client: anthropic.Anthropic) -> None:
    """The path is OpenAI's too: their header tells the clients apart."""
    models = {model.id: model for model in client.models.list()}
    assert {"chain:latest", "thinker:latest"} <= set(models)
    assert models["chain:latest"].type == "model"
    assert models["chain:latest"].created_at.year > 2000
    assert client.models.retrieve("chain").id == "chain"
    with pytest.raises(anthropic.NotFoundError, match="there is no model"):
        client.models.retrieve("nix")


def test_the_beta_client_asks_the_same_route(client: anthropic.Anthropic) -> None:
    message = client.beta.messages.create(model="chain", max_tokens=1, messages=USER)
    assert message.stop_reason == "max_tokens"


def test_errors_are_the_sdks_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model") as missing:
        client.messages.create(model="nix", max_tokens=1, messages=USER)
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id
    image: anthropic.types.ImageBlockParam = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "aGk="},
    }
    turn: anthropic.types.MessageParam = {"role": "user", "content": [image]}
    with pytest.raises(anthropic.BadRequestError, match="is an image"):
        client.messages.create(model="chain", max_tokens=1, messages=[turn])
    with pytest.raises(anthropic.BadRequestError, match="does not support chat"):
        client.messages.create(model="bert", max_tokens=1, messages=USER, stream=True)


def test_a_failure_in_the_middle_of_a_stream_is_raised(
    client: anthropic.Anthropic, url: str
) -> None:
    stream = client.messages.create(
        model="endless",
        max_tokens=ENDLESS_CTX,
        messages=USER,
        stream=True,
        extra_body={"options": {"num_ctx": ENDLESS_CTX}},
    )
    next(stream)
    kill_endless(url)
    with pytest.raises(anthropic.APIStatusError, match="worker"):
        list(stream)
