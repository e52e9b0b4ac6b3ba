"""POST /v1/completions over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.harness import Running
from tests.server.openai.conftest import sse_events
from tests.synthetic import CHAIN_TEXT

pytestmark = pytest.mark.asyncio(loop_scope="package")

PATH = "/v1/completions"


async def post(app: Running, **body: Any) -> dict[str, Any]:
    answer = await app.client.post(PATH, json={"model": "chain", "prompt": "x"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_prompt_is_taken_as_it_is(app: Running) -> None:
    answer = await post(app)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"text": CHAIN_TEXT, "index": 0, "logprobs": None, "finish_reason": "stop"}
    ]
    # The start token and the x: no template.
    assert answer["usage"]["prompt_tokens"] == 2


async def test_several_prompts_have_n_choices_each_in_order(app: Running) -> None:
    answer = await post(app, prompt=["a", "b"], n=2, echo=True, max_tokens=1)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "aOnce"),
        (1, "aOnce"),
        (2, "bOnce"),
        (3, "bOnce"),
    ]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 4


async def test_tokens_are_prompts_too(app: Running) -> None:
    tokens = {"model": "chain", "prompt": [[97, 98], [99]], "echo": True, "max_tokens": 1}
    answer = await post(app, **tokens)
    assert len(answer["choices"]) == 2
    assert all(choice["text"].endswith("Once") for choice in answer["choices"])
    # No start token is added to them.
    assert answer["usage"]["prompt_tokens"] == 3
    one = await post(app, prompt=[97, 98], max_tokens=1)
    assert one["usage"]["prompt_tokens"] == 2


async def test_a_suffix_is_filled_towards(app: Running) -> None:
    answer = await post(app, prompt="def f(", suffix="return")
    assert answer["choices"][0]["text"] == CHAIN_TEXT
    assert answer["usage"]["prompt_tokens"] > 5


async def test_logprobs_are_lists_with_offsets(app: Running) -> None:
    answer = await post(app, logprobs=1, max_tokens=10)
    choice = answer["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == 10
    assert found["text_offset"][0] == 0
    first = found["tokens"][0]
    assert found["top_logprobs"][0] == {first: found["token_logprobs"][0]}
    # Up to the first character that is cut in two, offsets point into the text.
    for token, offset in zip(found["tokens"][:4], found["text_offset"][:4], strict=True):
        assert choice["text"][offset:].startswith(token)


async def test_a_stream(app: Running) -> None:
    body = {
        "model": "chain",
        "prompt": ["a", "b"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = await app.client.post(PATH, json=body)
    *chunks, usage, done = sse_events(answer.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 4
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(choice["text"] for choice in mine) == CHAIN_TEXT
        assert mine[-1]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"best_of": 3}, "best_of is not supported"),
        ({"logprobs": 1, "echo": True}, "logprobs of the prompt"),
        ({"prompt": []}, '"prompt" may hold'),
        ({"prompt": [1, "a"]}, '"prompt[0]"'),
        ({"prompt": ["a", {}]}, '"prompt[1]"'),
        ({"prompt": [1_000_000]}, "1000000"),
        ({"prompt": ["a"] * 65}, "65 prompts"),
        ({"prompt": [1], "suffix": "x"}, "suffix"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"model": "bert"}, "does not support generate"),
    ],
)
async def test_errors_name_what_is_wrong(app: Running, body: dict[str, Any], words: str) -> None:
    answer = await app.client.post(PATH, json={"model": "chain", "prompt": "x"} | body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
