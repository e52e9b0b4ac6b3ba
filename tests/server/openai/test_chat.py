"""POST /v1/chat/completions over HTTP."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from tests.server.harness import Running
from tests.server.openai.conftest import TIME, WEATHER, sse_events
from tests.synthetic import CHAIN_TEXT

pytestmark = pytest.mark.asyncio(loop_scope="package")

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]
UNSET_FIELDS = (
    "n",
    "max_tokens",
    "stop",
    "seed",
    "user",
    "tools",
    "tool_choice",
    "response_format",
    "logit_bias",
    "logprobs",
    "stream_options",
    "temperature",
    "parallel_tool_calls",
    "reasoning_effort",
    "keep_alive",
)
_VARYING = re.compile(rb'"id":"chatcmpl-[0-9a-f]{24}"|"created":\d{10}')


async def post(app: Running, **body: Any) -> dict[str, Any]:
    answer = await app.client.post(PATH, json={"model": "chain", "messages": USER} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stream(app: Running, **body: Any) -> list[Any]:
    given = {"model": "chain", "messages": USER, "stream": True} | body
    answer = await app.client.post(PATH, json=given)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    return sse_events(answer.text)


def joined(chunks: list[Any], index: int = 0, field: str = "content") -> str:
    return "".join(
        choice["delta"].get(field) or ""
        for chunk in chunks
        if chunk != "[DONE]"
        for choice in chunk["choices"]
        if choice["index"] == index
    )


async def test_a_whole_answer_golden(app: Running) -> None:
    body = {"model": "chain", "messages": USER, "max_tokens": 1}
    answer = await app.client.post(PATH, json=body)
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    n_prompt = answer.json()["usage"]["prompt_tokens"]
    n_cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert _VARYING.sub(b"X", answer.content).decode() == (
        '{X,"object":"chat.completion",X,"model":"chain","system_fingerprint":"fp_shimpy",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"Once","refusal":null},'
        '"logprobs":null,"finish_reason":"length"}],'
        f'"usage":{{"prompt_tokens":{n_prompt},"completion_tokens":1,"total_tokens":{n_prompt + 1},'
        f'"prompt_tokens_details":{{"cached_tokens":{n_cached}}},'
        '"completion_tokens_details":{"reasoning_tokens":0}}}'
    )


async def test_a_stream_golden(app: Running) -> None:
    """Role with the first text, an empty delta with the reason, the usage with no choices."""
    body = {"model": "chain", "messages": USER, "max_completion_tokens": 1, "stream": True}
    answer = await app.client.post(PATH, json=body | {"stream_options": {"include_usage": True}})
    head = (
        'data: {X,"object":"chat.completion.chunk",X,"model":"chain",'
        '"system_fingerprint":"fp_shimpy","choices":'
    )
    lines = _VARYING.sub(b"X", answer.content).decode().split("\n\n")
    assert lines[:2] == [
        head + '[{"index":0,"delta":{"role":"assistant","content":"Once"},"logprobs":null,'
        '"finish_reason":null}],"usage":null}',
        head + '[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}',
    ]
    assert lines[2].startswith(head + '[],"usage":{"prompt_tokens":')
    assert lines[3:] == ["data: [DONE]", ""]


async def test_all_chunks_share_one_id_and_time(app: Running) -> None:
    *chunks, done = await stream(app)
    assert done == "[DONE]"
    assert joined(chunks) == CHAIN_TEXT
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_choices_are_as_many_as_asked_for_and_share_the_prompt(app: Running) -> None:
    answer = await post(app, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {CHAIN_TEXT}
    one = await post(app)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert usage["completion_tokens"] == 3 * one["usage"]["completion_tokens"]


async def test_streamed_choices_are_told_apart_by_their_index(app: Running) -> None:
    """More choices than slots take turns."""
    *chunks, done = await stream(app, n=10)
    assert done == "[DONE]"
    for index in range(10):
        assert joined(chunks, index) == CHAIN_TEXT
    reasons = [
        choice["index"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"] == "stop"
    ]
    assert sorted(reasons) == list(range(10))


async def test_seeded_choices_differ_and_repeat(app: Running) -> None:
    body: dict[str, Any] = {"model": "llama", "n": 3, "seed": 7, "temperature": 1.5}
    runs = [await post(app, max_tokens=12, **body) for _ in range(2)]
    first, again = [[choice["message"]["content"] for choice in run["choices"]] for run in runs]
    second = await post(app, max_tokens=12, **body | {"n": 1, "seed": 8})

    def is_alike(text: str, other: str) -> bool:
        """Not to the last token, where two may be as likely.

        Who is in a batch with whom differs, and so does the order of sums on some processors.
        Other seeds part with the first token.
        """
        half = len(text) // 2
        assert half > 3
        return text[:half] == other[:half]

    assert len(set(first)) == 3
    assert all(map(is_alike, first, again))
    assert is_alike(first[1], second["choices"][0]["message"]["content"])
    assert not is_alike(first[0], first[1])
    assert not is_alike(first[1], first[2])


async def test_cached_prompt_tokens_are_told(app: Running) -> None:
    messages = [{"role": "user", "content": "a long story about rivers " * 20}]
    first, second = [await post(app, messages=messages, max_tokens=1) for _ in range(2)]
    n_prompt = first["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt - 1


@pytest.mark.parametrize("stop", ["fox", ["never", "日本"], []])
async def test_stop_cuts(app: Running, stop: str | list[str]) -> None:
    cut = stop if isinstance(stop, str) else "".join(stop[1:])
    answer = await post(app, stop=stop)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == (CHAIN_TEXT.partition(cut)[0] if cut else CHAIN_TEXT)
    assert choice["finish_reason"] == "stop"


async def test_logprobs_come_with_their_rivals(app: Running) -> None:
    answer = await post(app, logprobs=True, top_logprobs=2, max_tokens=8)
    found = answer["choices"][0]["logprobs"]["content"]
    assert len(found) == 8
    text = b"".join(bytes(one["bytes"]) for one in found).decode(errors="ignore")
    assert CHAIN_TEXT.startswith(text)
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in found)
    streamed = await stream(app, logprobs=True, max_tokens=8)
    tokens = [
        one["token"]
        for chunk in streamed[:-1]
        for choice in chunk["choices"]
        for one in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == [one["token"] for one in found]


async def test_a_biased_token_is_never_said(app: Running) -> None:
    """The chain's next token is certain, until its id is banned."""
    first = (await post(app, max_tokens=1, options={"num_ctx": 2048}))["choices"][0]
    tokens = (
        await app.client.post("/v1/completions", json={"model": "chain", "prompt": "x"})
    ).json()
    assert first["message"]["content"] == "Once"
    assert tokens["choices"][0]["text"] == CHAIN_TEXT
    bias = {str(token): -100 for token in range(400, 512)}
    answer = await post(app, max_tokens=1, logit_bias=bias)
    assert "Once" not in answer["choices"][0]["message"]["content"]


async def test_parts_of_text_and_null_content_are_taken(app: Running) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
    ]
    answer = await post(app, messages=messages)
    assert answer["choices"][0]["message"]["content"] == CHAIN_TEXT


async def test_an_answer_may_go_on_from_the_last_message(app: Running) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon"}]
    counts = [
        (await post(app, messages=messages, max_tokens=1, continue_final_message=on))["usage"]
        for on in (True, False)
    ]
    # No end of the turn, and no header of another.
    assert counts[0]["prompt_tokens"] < counts[1]["prompt_tokens"]


async def test_unset_and_unknown_fields_are_nothing(app: Running) -> None:
    nothing: dict[str, Any] = dict.fromkeys(UNSET_FIELDS)
    answer = await post(app, **nothing, service_tier="auto", nonsense=[1], metadata={"a": "b"})
    assert answer["choices"][0]["message"]["content"] == CHAIN_TEXT


# --- structure --------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_schema_is_kept_by_a_model_of_noise(app: Running, streamed: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    body: dict[str, Any] = {
        "model": "llama",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "pair", "schema": schema, "strict": True},
        },
    }
    if streamed:
        text = joined(await stream(app, **body))
    else:
        text = (await post(app, **body))["choices"][0]["message"]["content"]
    value = msgspec.json.decode(text)
    assert isinstance(value["a"], int)
    assert value["b"] in {"x", "y"}


async def test_json_that_was_cut_off_says_so(app: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"minLength": 40}}, "required": ["a"]}
    response_format = {"type": "json_object", "schema": schema}
    answer = await post(
        app, model="llama", response_format=response_format, max_completion_tokens=3
    )
    (choice,) = answer["choices"]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] == "length"


async def test_a_grammar_is_followed(app: Running) -> None:
    answer = await post(app, model="llama", grammar='root ::= "yes" | "no"')
    assert answer["choices"][0]["message"]["content"] in {"yes", "no"}


# --- tools and thoughts -----------------------------------------------------------------------


async def test_calls_are_text_arguments_and_have_a_reason(app: Running) -> None:
    body: dict[str, Any] = {"model": "caller", "tools": [WEATHER, TIME]}
    (choice,) = (await post(app, **body))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look it up."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": '{"city":"Köln"}'},
        {"name": "get_time", "arguments": '{"zone":"Berlin"}'},
    ]
    assert all(call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == 2
    *chunks, _ = await stream(app, **body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in streamed] == [0, 1]
    assert [call["function"] for call in streamed] == [call["function"] for call in calls]
    assert deltas[0]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_parallel_calls_can_be_declined(app: Running) -> None:
    body: dict[str, Any] = {"model": "caller", "tools": [WEATHER, TIME]}
    answer = await post(app, parallel_tool_calls=False, **body)
    calls = answer["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["get_weather"]


async def test_no_tool_is_called_where_none_may_be(app: Running) -> None:
    answer = await post(app, model="caller", tools=[WEATHER, TIME], tool_choice="none")
    message = answer["choices"][0]["message"]
    assert "tool_calls" not in message
    assert "<tool_call>" in message["content"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            {"get_weather"},
        ),
    ],
    ids=["required", "named", "allowed"],
)
async def test_a_required_call_is_made_by_a_model_of_noise(
    app: Running, choice: Any, names: set[str]
) -> None:
    for seed in range(3):
        answer = await post(
            app, model="llama", tools=[WEATHER, TIME], tool_choice=choice, seed=seed
        )
        (made,) = answer["choices"]
        assert made["finish_reason"] == "tool_calls"
        (call,) = made["message"]["tool_calls"]
        assert call["function"]["name"] in names
        arguments = msgspec.json.decode(call["function"]["arguments"])
        assert set(arguments) <= {"city", "zone"}
        assert made["message"]["content"] is None


async def test_an_answer_by_schema_may_be_a_call_instead(app: Running) -> None:
    body = {
        "model": "llama",
        "tools": [TIME],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "object", "properties": {}}},
        },
    }
    for seed in range(6):
        (choice,) = (await post(app, seed=seed, temperature=2, **body))["choices"]
        message = choice["message"]
        if choice["finish_reason"] == "tool_calls":
            assert message["tool_calls"][0]["function"]["name"] == "get_time"
        else:
            assert isinstance(msgspec.json.decode(message["content"]), dict)


async def test_thoughts_have_their_own_fields_and_count(app: Running) -> None:
    answer = await post(app, model="thinker")
    message = answer["choices"][0]["message"]
    assert message["content"] == "The Rhine flows there."
    assert message["reasoning"] == message["reasoning_content"] == "Hmm, rivers first."
    details = answer["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"]
    chunks = await stream(app, model="thinker")
    assert joined(chunks, field="reasoning_content") == "Hmm, rivers first."
    assert joined(chunks) == "The Rhine flows there."


async def test_effort_reaches_the_template_and_is_a_hint(app: Running) -> None:
    """Qwen's template writes an empty thought where there is to be none."""
    counts = {
        effort: (await post(app, model="thinker", reasoning_effort=effort, max_tokens=1))["usage"]
        for effort in ("none", "high")
    }
    assert counts["none"]["prompt_tokens"] > counts["high"]["prompt_tokens"]
    by_kwargs = await post(
        app, model="thinker", chat_template_kwargs={"enable_thinking": False}, max_tokens=1
    )
    assert by_kwargs["usage"]["prompt_tokens"] == counts["none"]["prompt_tokens"]
    assert (await post(app, reasoning_effort="high"))["choices"][0]["finish_reason"] == "stop"


async def test_keep_alive_works_here_too(app: Running) -> None:
    await post(app, model="base", keep_alive=-1)
    listed = (await app.client.get("/api/ps")).json()["models"]
    base = next(model for model in listed if model["name"] == "base:latest")
    assert int(base["expires_at"][:4]) > 2300


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words", "param"),
    [
        ({"model": None}, 400, "model is required", "model"),
        ({"model": "nix"}, 404, "model 'nix' not found", None),
        ({"model": "nix", "stream": True}, 404, "model 'nix' not found", None),
        ({"messages": []}, 400, "[] is too short - 'messages'", "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, 400, "role", "messages[0].role"),
        ({"messages": "x"}, 400, '"messages" must be a list', "messages"),
        ({"n": 0}, 400, "1 to 64", "n"),
        ({"continue_final_message": True}, 400, "assistant", "continue_final_message"),
        ({"n": 65}, 400, "1 to 64", "n"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "top_logprobs"),
        ({"temperature": "warm"}, 400, '"temperature" must be a number', "temperature"),
        ({"temperature": -1}, 400, "temperature", "temperature"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "logit_bias"),
        ({"logit_bias": {"100000": 1}}, 400, "100000", None),
        ({"response_format": {"type": "xml"}}, 400, "json_schema", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, 400, "no schema", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            400,
            "#/not",
            None,
        ),
        ({"grammar": "root ::= (", "model": "llama"}, 400, "grammar", None),
        ({"tool_choice": "required"}, 400, "no tools", "tools"),
        ({"tool_choice": "perhaps"}, 400, "tool_choice must be", "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            400,
            "the tools are: get_weather",
            "tool_choice",
        ),
        ({"tools": [{"type": "web_search"}]}, 400, "web_search", "tools[0]"),
        ({"reasoning_effort": "very"}, 400, "reasoning_effort must be", "reasoning_effort"),
        ({"keep_alive": "5"}, 400, "keep_alive", "keep_alive"),
        ({"model": "bert"}, 400, "does not support chat", None),
    ],
)
async def test_errors_name_what_is_wrong(
    app: Running, body: dict[str, Any], status: int, words: str, param: str | None
) -> None:
    if body.get("model", "") is None:
        await app.unload_all()
    answer = await app.client.post(PATH, json={"model": "chain", "messages": USER} | body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}, "vision"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}, "data: URL"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}, "base64"),
        ({"type": "input_audio"}, "input_audio"),
    ],
)
async def test_what_a_model_cannot_see_or_hear_is_a_clear_400(
    app: Running, part: dict[str, Any], words: str
) -> None:
    body = {"model": "chain", "messages": [{"role": "user", "content": [part]}]}
    answer = await app.client.post(PATH, json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


async def test_a_prompt_over_the_context_has_openais_code(app: Running) -> None:
    messages = [{"role": "user", "content": "word " * 4000}]
    answer = await app.client.post(PATH, json={"model": "chain", "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "2048" in answer.json()["error"]["message"]
