"""The ollama package for Python against a real daemon: only its host is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ollama
import pydantic
import pytest

from tests.clients.conftest import ENDLESS_CTX, kill_endless
from tests.synthetic import CHAIN_TEXT

pytestmark = pytest.mark.clients

USER = [{"role": "user", "content": "Weather in Köln?"}]


class Pair(pydantic.BaseModel):
    a: int
    b: bool


def get_weather(city: str) -> str:
    """Say what the weather is.

    Args:
        city: The city's name.
    """
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=url) as made:
        yield made


def test_generate(client: ollama.Client) -> None:
    whole = client.generate("chain", "hi")
    assert whole.response == CHAIN_TEXT
    assert whole.done
    assert whole.done_reason == "stop"
    assert whole.eval_count
    assert whole.total_duration
    parts = list(client.generate("chain", "hi", stream=True, options={"num_predict": 4}))
    assert CHAIN_TEXT.startswith("".join(part.response for part in parts))
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].done_reason == "length"


def test_generate_goes_on_from_its_context(client: ollama.Client) -> None:
    first = client.generate("chain", "hi")
    second = client.generate("chain", "on", context=first.context)
    assert second.context is not None
    assert list(second.context)[: len(first.context or ())] == list(first.context or ())


def test_generate_fills_a_gap(client: ollama.Client) -> None:
    assert client.generate("chain", "def f(", suffix="return").response == CHAIN_TEXT


def test_chat(client: ollama.Client) -> None:
    whole = client.chat("chain", messages=USER)
    assert whole.message.role == "assistant"
    assert whole["message"]["content"] == CHAIN_TEXT
    parts = list(client.chat("chain", messages=USER, stream=True))
    assert "".join(part.message.content or "" for part in parts) == CHAIN_TEXT
    assert parts[-1].done


async def test_the_async_client(url: str) -> None:
    async with ollama.AsyncClient(host=url) as client:
        assert (await client.generate("chain", "hi")).response == CHAIN_TEXT
        parts = [part async for part in await client.chat("chain", messages=USER, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == CHAIN_TEXT


def test_a_tool_from_a_python_function_is_called(client: ollama.Client) -> None:
    messages: list[ollama.Message | dict[str, str]] = [*USER]
    answer = client.chat("caller", messages=messages, tools=[get_weather])
    assert answer.message.content == "I look it up."
    (call,) = answer.message.tool_calls or []
    assert call.function.name == "get_weather"
    assert get_weather(**call.function.arguments) == "sunny in Köln"
    result = {"role": "tool", "tool_name": "get_weather", "content": "sunny in Köln"}
    follow_up = client.chat("caller", messages=[*messages, answer.message, result])
    assert follow_up.prompt_eval_count
    assert answer.prompt_eval_count


def test_streamed_tool_calls_come_whole(client: ollama.Client) -> None:
    parts = list(client.chat("caller", messages=USER, tools=[get_weather], stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or []]
    assert [call.function.arguments for call in calls] == [{"city": "Köln"}]


def test_thinking(client: ollama.Client) -> None:
    answer = client.chat("thinker", messages=USER, think=True)
    assert answer.message.thinking == "Rivers first."
    assert answer.message.content == "The Rhine flows there."
    streamed = list(client.generate("thinker", "x", think=True, stream=True))
    assert "".join(part.thinking or "" for part in streamed) == "Rivers first."


def test_a_schema_is_kept_by_a_model_of_noise(client: ollama.Client) -> None:
    answer = client.chat("llama", messages=USER, format=Pair.model_json_schema())
    Pair.model_validate_json(answer.message.content or "")
    whole = client.generate("llama", "x", format="json", options={"num_predict": 200, "seed": 1})
    assert whole.response.startswith("{")


def test_embeddings(client: ollama.Client) -> None:
    found = client.embed("bert", ["a b", "c"])
    assert len(found.embeddings) == 2
    assert math.hypot(*found.embeddings[0]) == pytest.approx(1)
    assert len(client.embed("llama", "a b", dimensions=8).embeddings[0]) == 8
    assert len(client.embeddings("bert", "a b").embedding) == len(found.embeddings[0])
    with pytest.raises(ollama.ResponseError, match="input 0 has"):
        client.embed("bert", "word " * 5000, truncate=False)


def test_models_are_listed_and_shown(client: ollama.Client) -> None:
    names = {model.model for model in client.list().models}
    assert {"chain:latest", "bert:latest"} <= names
    shown = client.show("chain")
    assert shown.details is not None
    assert shown.details.family == "llama"
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 4096
    assert "completion" in (shown.capabilities or [])


def test_a_model_is_loaded_and_unloaded(client: ollama.Client) -> None:
    assert client.generate("chain", keep_alive="10m").done_reason == "load"
    (resident,) = (m for m in client.ps().models if m.name == "chain:latest")
    assert resident.size
    assert resident.expires_at is not None
    assert client.generate("chain", keep_alive=0).done_reason == "unload"


def test_errors_have_their_status(client: ollama.Client) -> None:
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="model 'nix' not found") as missing:
            list(client.chat("nix", messages=USER, stream=stream))
        assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as refused:
        client.chat("chain", messages=USER, think=True)
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="num_ctx"):
        client.generate("chain", "x", options={"num_ctx": "many"})
    with pytest.raises(ollama.ResponseError, match="push is not supported"):
        client.push("chain")


def test_a_model_is_made_from_another_copied_and_deleted(client: ollama.Client) -> None:
    parts = client.create("brief", from_="chain", parameters={"num_predict": 2}, stream=True)
    assert [part.status for part in parts][-1] == "success"
    try:
        assert client.generate("brief", "hi").done_reason == "length"
        assert client.copy("brief", "shorter").status == "success"
        assert client.generate("shorter", "hi").eval_count == 2
    finally:
        client.delete("brief")
        client.delete("shorter")
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.show("brief")


def test_a_killed_worker_is_an_error_in_the_stream_and_a_fresh_load_after_it(
    client: ollama.Client, url: str
) -> None:
    options = {"num_ctx": ENDLESS_CTX}
    stream = client.generate("endless", "x", stream=True, options=options)
    next(stream)
    kill_endless(url)
    with pytest.raises(ollama.ResponseError, match="worker"):
        list(stream)
    assert client.generate("endless", "x", options={"num_predict": 3}).eval_count == 3
