"""langchain-ollama against a real daemon: only its base URL is changed."""

from __future__ import annotations

import math

import pydantic
import pytest
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from ollama import ResponseError

from tests.synthetic import CHAIN_TEXT

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


class Pair(pydantic.BaseModel):
    """Two values."""

    a: int
    b: bool


@tool
def get_weather(city: str) -> str:
    """Say what the weather is."""
    return f"sunny in {city}"


def test_chat(url: str) -> None:
    chat = ChatOllama(model="chain", base_url=url, num_ctx=2048, keep_alive="5m")
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage("hi")])
    assert answer.content == CHAIN_TEXT
    assert answer.response_metadata["done_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 5
    assert "".join(str(chunk.content) for chunk in chat.stream("hi")) == CHAIN_TEXT


async def test_the_async_chat(url: str) -> None:
    chat = ChatOllama(model="chain", base_url=url, temperature=0, num_predict=4, stop=["fox"])
    answer = await chat.ainvoke("hi")
    assert CHAIN_TEXT.startswith(str(answer.content))
    assert answer.response_metadata["done_reason"] == "length"
    parts = [str(chunk.content) async for chunk in chat.astream("hi")]
    assert "".join(parts) == answer.content


def test_a_bound_tool_is_called_and_answered(url: str) -> None:
    chat = ChatOllama(model="caller", base_url=url).bind_tools([get_weather])
    question = HumanMessage("Weather in Köln?")
    answer = chat.invoke([question])
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Köln"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    plain = ChatOllama(model="chain", base_url=url)
    assert plain.invoke([question, answer, result]).content == CHAIN_TEXT


def test_reasoning_is_apart(url: str) -> None:
    chat = ChatOllama(model="thinker", base_url=url, reasoning=True)
    answer = chat.invoke("hi")
    assert answer.content == "The Rhine flows there."
    assert answer.additional_kwargs["reasoning_content"] == "Rivers first."


def test_structured_output_by_schema(url: str) -> None:
    chat = ChatOllama(model="llama", base_url=url).with_structured_output(Pair)
    assert isinstance(chat.invoke("two values"), Pair)


def test_text_completion(url: str) -> None:
    llm = OllamaLLM(model="chain", base_url=url)
    assert llm.invoke("hi") == CHAIN_TEXT
    assert "".join(llm.stream("hi")) == CHAIN_TEXT


def test_embeddings(url: str) -> None:
    embeddings = OllamaEmbeddings(model="bert", base_url=url)
    documents = embeddings.embed_documents(["a b", "c"])
    assert len(documents) == 2
    assert math.hypot(*documents[0]) == pytest.approx(1)
    assert embeddings.embed_query("a b") == pytest.approx(documents[0], abs=2e-3)


def test_an_unknown_model_is_an_error(url: str) -> None:
    with pytest.raises(ResponseError, match="not found"):
        ChatOllama(model="nix", base_url=url).invoke("hi")
