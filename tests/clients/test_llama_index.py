"""LlamaIndex's Ollama classes against a real daemon: only their base URL is changed."""

from __future__ import annotations

import math

import ollama
import pydantic
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.llms.ollama import Ollama

from tests.synthetic import CHAIN_TEXT

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

USER = [ChatMessage(role="user", content="Weather in Köln?")]


class Pair(pydantic.BaseModel):
    """Two values."""

    a: int
    b: bool


def get_weather(city: str) -> str:
    """Say what the weather is."""
    return f"sunny in {city}"


def llm(url: str, model: str = "chain") -> Ollama:
    return Ollama(model=model, base_url=url, request_timeout=30)


def test_complete(url: str) -> None:
    assert llm(url).complete("hi").text == CHAIN_TEXT
    assert list(llm(url).stream_complete("hi"))[-1].text == CHAIN_TEXT


def test_chat(url: str) -> None:
    assert llm(url).chat(USER).message.content == CHAIN_TEXT
    assert list(llm(url).stream_chat(USER))[-1].message.content == CHAIN_TEXT


async def test_the_async_chat(url: str) -> None:
    model = llm(url)
    assert (await model.achat(USER)).message.content == CHAIN_TEXT
    deltas = [part.delta or "" async for part in await model.astream_chat(USER)]
    assert "".join(deltas) == CHAIN_TEXT


def test_a_tool_is_called(url: str) -> None:
    model = llm(url, "caller")
    answer = model.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg="hi")
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Köln"})


def test_a_schema_is_kept(url: str) -> None:
    from llama_index.core.prompts import PromptTemplate

    found = llm(url, "llama").structured_predict(Pair, PromptTemplate("two values"))
    assert isinstance(found, Pair)


def test_embeddings(url: str) -> None:
    model = OllamaEmbedding(model_name="bert", base_url=url)
    found = model.get_text_embedding_batch(["a b", "c"])
    assert len(found) == 2
    assert math.hypot(*found[0]) == pytest.approx(1)


def test_an_unknown_model_is_an_error(url: str) -> None:
    with pytest.raises(ollama.ResponseError, match="not found"):
        llm(url, "nix").chat(USER)
