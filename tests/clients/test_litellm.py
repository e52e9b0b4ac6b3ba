"""litellm against a real daemon, by three of its providers."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

# It would fetch prices while it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

from tests.synthetic import CHAIN_TEXT

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

USER = [{"role": "user", "content": "Weather in Köln?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Say what the weather is.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "pair",
        "schema": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
            "required": ["a", "b"],
        },
    },
}
PROVIDERS = ["ollama", "ollama_chat", "openai"]


def where(provider: str, model: str, url: str) -> dict[str, Any]:
    base = f"{url}/v1" if provider == "openai" else url
    return {"model": f"{provider}/{model}", "api_base": base, "api_key": "any"}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_completion(url: str, provider: str) -> None:
    whole = litellm.completion(**where(provider, "chain", url), messages=USER)
    assert whole.choices[0].message.content == CHAIN_TEXT
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 5


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_stream(url: str, provider: str) -> None:
    chunks = litellm.completion(
        **where(provider, "chain", url), messages=USER, stream=True, max_tokens=4
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text
    assert CHAIN_TEXT.startswith(text)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_the_async_form(url: str, provider: str) -> None:
    stream = await litellm.acompletion(
        **where(provider, "chain", url), messages=USER, stream=True, temperature=0
    )
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == CHAIN_TEXT


@pytest.mark.parametrize("provider", ["ollama_chat", "openai"])
def test_a_tool_is_called(url: str, provider: str) -> None:
    whole = litellm.completion(**where(provider, "caller", url), messages=USER, tools=TOOLS)
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    assert whole.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_schema_is_kept(url: str, provider: str) -> None:
    whole = litellm.completion(
        **where(provider, "llama", url), messages=USER, response_format=SCHEMA
    )
    value = json.loads(whole.choices[0].message.content)
    assert isinstance(value["a"], int)
    assert isinstance(value["b"], bool)


@pytest.mark.parametrize("provider", ["ollama_chat", "openai"])
def test_reasoning_is_apart(url: str, provider: str) -> None:
    whole = litellm.completion(**where(provider, "thinker", url), messages=USER)
    assert whole.choices[0].message.content == "The Rhine flows there."
    assert whole.choices[0].message.reasoning_content == "Rivers first."


@pytest.mark.parametrize("provider", ["ollama", "openai"])
def test_embeddings(url: str, provider: str) -> None:
    found = litellm.embedding(**where(provider, "bert", url), input=["a b", "c"])
    assert len(found.data) == 2
    assert len(found.data[0]["embedding"]) > 8


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_unknown_model_is_an_error(url: str, provider: str) -> None:
    with pytest.raises((litellm.APIConnectionError, litellm.NotFoundError), match="not found"):
        litellm.completion(**where(provider, "nix", url), messages=USER)
