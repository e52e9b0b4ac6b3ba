"""Ollama's dialect, byte for byte, over HTTP against the real llama.cpp."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

import shimpy
from shimpy.registry.model import Model
from tests.server.harness import Running, running_app
from tests.synthetic import CHAIN_TEXT, write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
_COUNTS = re.compile(rb'"((?:total|load|prompt_eval|eval)_(?:duration|count))":\d+')


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(
    tmp_path_factory: pytest.TempPathFactory,
    chain_model: Path,
    bert_model: Path,
    llama_model: Path,
) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("ollama")
    shutil.copy(chain_model, folder / "chain.gguf")
    shutil.copy(bert_model, folder / "bert.gguf")
    shutil.copy(llama_model, folder / "llama.gguf")
    write_chain(folder / "base.gguf", chat_template=None)
    (folder / "broken.gguf").write_bytes(b"<!doctype html>")
    async with running_app(folder, tmp_path_factory.mktemp("state")) as running:
        yield running


def _golden(body: bytes) -> bytes:
    """Put fixed words where times and measurements are."""
    return _COUNTS.sub(rb'"\1":N', _TIME.sub(b"TIME", body))


def _join(lines: list[dict[str, Any]], *path: str) -> str:
    texts = []
    for line in lines:
        value: Any = line
        for key in path:
            value = value[key]
        texts.append(value)
    return "".join(texts)


# --- fixed answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_root_says_that_ollama_runs(app: Running, method: str) -> None:
    """The ollama command sends HEAD / before anything else."""
    answer = await app.client.request(method, "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == ("Ollama is running" if method == "GET" else "")


async def test_the_version_is_three_numbers(app: Running) -> None:
    """Open WebUI and Copilot parse nothing else."""
    answer = await app.client.get("/api/version")
    assert re.fullmatch(r"\d+\.\d+\.\d+", answer.json()["version"])
    assert answer.json()["shimpy"] == shimpy.__version__
    assert (await app.client.head("/api/version")).status_code == 200


async def test_the_version_is_one_that_copilot_takes(app: Running) -> None:
    """Its MINIMUM_OLLAMA_VERSION; it compares the numbers one by one."""
    version = (await app.client.get("/api/version")).json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


async def test_unknown_paths_and_wrong_methods_are_texts(app: Running) -> None:
    missing = await app.client.get("/api/nothing")
    assert (missing.status_code, missing.text) == (404, "404 page not found")
    wrong = await app.client.get("/api/generate")
    assert (wrong.status_code, wrong.text) == (405, "405 method not allowed")
    assert wrong.headers["allow"] == "POST"


# --- generate ---------------------------------------------------------------------------------


async def test_generate_streams_ndjson_by_default(app: Running) -> None:
    body = b'{"model":"chain","prompt":"hi","options":{"num_predict":1},"raw":true}'
    # As curl -d sends it.
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await app.client.post("/api/generate", content=body, headers=headers)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert _golden(answer.content) == (
        b'{"model":"chain","created_at":"TIME","response":"Once","done":false}\n'
        b'{"model":"chain","created_at":"TIME","response":"","done":true,"done_reason":"length",'
        b'"total_duration":N,"load_duration":N,"prompt_eval_count":N,"prompt_eval_duration":N,'
        b'"eval_count":N,"eval_duration":N}\n'
    )


async def test_generate_says_the_known_text_and_nothing_else(app: Running) -> None:
    lines = await app.lines("/api/generate", {"model": "chain", "prompt": "hi"})
    assert _join(lines, "response") == CHAIN_TEXT
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all(line["model"] == "chain" and line["created_at"] for line in lines)


async def test_generate_whole_is_one_object_with_counts_in_nanoseconds(app: Running) -> None:
    answer = await app.client.post(
        "/api/generate", json={"model": "chain:latest", "prompt": "hi", "stream": False}
    )
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    whole = answer.json()
    assert whole["response"] == CHAIN_TEXT
    assert whole["model"] == "chain:latest"
    assert whole["done_reason"] == "stop"
    assert whole["eval_count"] > 5
    assert 0 < whole["eval_duration"] <= whole["total_duration"] < 60e9


async def test_context_continues_a_conversation(app: Running) -> None:
    first = (await app.lines("/api/generate", {"model": "chain", "prompt": "hi"}))[-1]
    second = (
        await app.lines(
            "/api/generate", {"model": "chain", "prompt": "on", "context": first["context"]}
        )
    )[-1]
    n_before = len(first["context"])
    # All but the end token.
    assert n_before == first["prompt_eval_count"] + first["eval_count"] - 1
    assert second["context"][:n_before] == first["context"]
    assert second["prompt_eval_count"] > n_before


@pytest.mark.parametrize("stop", ["fox", "日本", "🙂 fox sa"])
async def test_stop_strings_cut_and_never_leak(app: Running, stop: str) -> None:
    options = {"stop": [stop, "never said"]}
    lines = await app.lines("/api/generate", {"model": "chain", "prompt": "x", "options": options})
    assert _join(lines, "response") == CHAIN_TEXT.partition(stop)[0]
    assert lines[-1]["done_reason"] == "stop"


async def test_a_model_without_a_template_gets_the_prompt_as_it_is(app: Running) -> None:
    body = {"model": "base", "prompt": "abc", "stream": False, "raw": False}
    plain = (await app.client.post("/api/generate", json=body)).json()
    raw = (await app.client.post("/api/generate", json=body | {"raw": True})).json()
    assert plain["prompt_eval_count"] == raw["prompt_eval_count"]


async def test_a_system_message_and_a_template_of_the_request_are_used(app: Running) -> None:
    body = {"model": "chain", "prompt": "abc", "stream": False}
    plain = (await app.client.post("/api/generate", json=body)).json()
    with_system = (await app.client.post("/api/generate", json=body | {"system": "sys"})).json()
    assert with_system["prompt_eval_count"] > plain["prompt_eval_count"]
    bare = body | {"template": "{{ .Prompt }}"}
    assert (await app.client.post("/api/generate", json=bare)).json()["prompt_eval_count"] == (
        await app.client.post("/api/generate", json=body | {"raw": True})
    ).json()["prompt_eval_count"]


async def test_a_suffix_is_filled_by_the_models_own_tokens(app: Running) -> None:
    body = {"model": "chain", "prompt": "def f(", "suffix": "return", "stream": False}
    answer = (await app.client.post("/api/generate", json=body)).json()
    assert answer["response"] == CHAIN_TEXT


async def test_an_empty_prompt_loads_and_keep_alive_zero_unloads(app: Running) -> None:
    """One JSON object each, though streaming is the default."""
    load = await app.client.post("/api/generate", json={"model": "base"})
    assert _golden(load.content) == (
        b'{"model":"base","created_at":"TIME","response":"","done":true,"done_reason":"load"}'
    )
    assert "base:latest" in [m["name"] for m in (await app.client.get("/api/ps")).json()["models"]]
    unload = {"model": "base", "prompt": "", "keep_alive": 0}
    for _ in range(2):
        answer = await app.client.post("/api/generate", json=unload)
        assert answer.json()["done_reason"] == "unload"
    chat = await app.client.post("/api/chat", json={"model": "base", "messages": []})
    assert _golden(chat.content) == (
        b'{"model":"base","created_at":"TIME","message":{"role":"assistant","content":""},'
        b'"done":true,"done_reason":"load"}'
    )


async def test_logprobs_come_with_the_text(app: Running) -> None:
    body = {"model": "chain", "prompt": "x", "logprobs": True, "top_logprobs": 2, "stream": False}
    answer = (await app.client.post("/api/generate", json=body)).json()
    first = answer["logprobs"][0]
    assert bytes(first["bytes"]).decode() == first["token"] == "Once"
    assert first["logprob"] <= 0
    assert len(first["top_logprobs"]) == 2
    assert len(answer["logprobs"]) >= answer["eval_count"] - 1


# --- format -----------------------------------------------------------------------------------


async def test_format_json_makes_even_a_random_model_write_json(app: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
    }
    body = {"model": "llama", "prompt": "x", "stream": False, "options": {"num_predict": 400}}
    for raw in (False, True):
        asked = body | {"format": schema, "raw": raw}
        answer = (await app.client.post("/api/generate", json=asked)).json()
        assert answer["done_reason"] == "stop"
        value = msgspec.json.decode(answer["response"])
        assert isinstance(value["a"], int)
        assert value["b"] in ("x", "y")
    loose = (await app.client.post("/api/generate", json=body | {"format": "json"})).json()
    assert loose["response"].startswith("{")
    assert loose["done_reason"] in ("stop", "length")


async def test_a_schema_that_cannot_be_compiled_names_the_part(app: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    body = {"model": "llama", "prompt": "x", "format": schema}
    answer = await app.client.post("/api/generate", json=body)
    assert answer.status_code == 400
    assert "/properties/a" in answer.json()["error"]


# --- the older native form --------------------------------------------------------------------


async def test_top_level_options_are_taken_where_there_are_no_options(app: Running) -> None:
    body = {"model": "chain", "prompt": "x", "max_tokens": 3, "temperature": 0.7, "stream": False}
    answer = (await app.client.post("/api/generate", json=body)).json()
    assert answer["eval_count"] == 3
    assert answer["done_reason"] == "length"


async def test_top_level_options_are_ignored_beside_options(app: Running) -> None:
    body = {"model": "chain", "prompt": "x", "max_tokens": 3, "options": {}, "stream": False}
    assert (await app.client.post("/api/generate", json=body)).json()["done_reason"] == "stop"


async def test_server_sent_events_of_bare_text(app: Running) -> None:
    body = {"model": "chain", "prompt": "x", "max_tokens": 1}
    answer = await app.client.post(
        "/api/generate", json=body, headers={"Accept": "text/event-stream"}
    )
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.content == b"data: Once\n\ndata: [DONE]\n\n"


async def test_messages_at_the_top_level_are_a_conversation(app: Running) -> None:
    body = {"model": "chain", "messages": [{"role": "user", "content": "x"}], "stream": False}
    answer = (await app.client.post("/api/generate", json=body)).json()
    assert answer["response"] == CHAIN_TEXT


# --- chat -------------------------------------------------------------------------------------


async def test_chat_has_what_zed_needs_on_every_line(app: Running) -> None:
    body = {
        "model": "chain",
        "messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "x"}],
        "keep_alive": -1,
        "tools": [],
        "think": None,
        "options": {"stop": [], "num_ctx": 2048},
    }
    lines = await app.lines("/api/chat", body)
    assert _join(lines, "message", "content") == CHAIN_TEXT
    for line in lines:
        assert line["message"]["role"] == "assistant"
        assert {"model", "created_at", "done"} <= line.keys()


async def test_chat_golden_chunks(app: Running) -> None:
    body = {"model": "chain", "messages": [{"role": "user", "content": "x"}]}
    options = {"options": {"num_predict": 1}}
    answer = await app.client.post("/api/chat", json=body | options)
    assert _golden(answer.content) == (
        b'{"model":"chain","created_at":"TIME","message":{"role":"assistant","content":"Once"},'
        b'"done":false}\n'
        b'{"model":"chain","created_at":"TIME","message":{"role":"assistant","content":""},'
        b'"done":true,"done_reason":"length","total_duration":N,"load_duration":N,'
        b'"prompt_eval_count":N,"prompt_eval_duration":N,"eval_count":N,"eval_duration":N}\n'
    )
    whole = await app.client.post("/api/chat", json=body | {"stream": False})
    assert whole.json()["message"] == {"role": "assistant", "content": CHAIN_TEXT}


async def test_tool_calls_without_content_are_taken(app: Running) -> None:
    """ellama sends them so, and others send the arguments as JSON text."""
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_name": "f"},
    ]
    lines = await app.lines("/api/chat", {"model": "chain", "messages": messages})
    assert _join(lines, "message", "content") == CHAIN_TEXT


# --- embeddings -------------------------------------------------------------------------------


async def test_embed_gives_one_vector_of_length_one_for_each_input(app: Running) -> None:
    answer = await app.client.post("/api/embed", json={"model": "bert", "input": ["a b", "c"]})
    body = answer.json()
    assert body["model"] == "bert"
    assert len(body["embeddings"]) == 2
    assert body["embeddings"][0] != body["embeddings"][1]
    for vector in body["embeddings"]:
        assert math.hypot(*vector) == pytest.approx(1)
    assert body["prompt_eval_count"] > 0
    one = (await app.client.post("/api/embed", json={"model": "bert", "input": "a b"})).json()
    assert one["embeddings"][0] == pytest.approx(body["embeddings"][0], abs=1e-4)


async def test_embed_can_shorten_vectors(app: Running) -> None:
    body = {"model": "bert", "input": "a b", "dimensions": 8}
    (vector,) = (await app.client.post("/api/embed", json=body)).json()["embeddings"]
    assert len(vector) == 8
    assert math.hypot(*vector) == pytest.approx(1)
    too_many = await app.client.post("/api/embed", json=body | {"dimensions": 100_000})
    assert too_many.status_code == 400
    assert "dimensions must be from 1 to" in too_many.json()["error"]


async def test_embed_cuts_long_texts_unless_told_not_to(app: Running) -> None:
    """A bad length must not cost the worker: bert aborts on it."""
    body = {"model": "bert", "input": ["word " * 5000]}
    assert (await app.client.post("/api/embed", json=body)).status_code == 200
    refused = await app.client.post("/api/embed", json=body | {"truncate": False})
    assert refused.status_code == 400
    assert len((await app.client.post("/api/embed", json=body)).json()["embeddings"]) == 1


async def test_embed_of_nothing_loads_the_model(app: Running) -> None:
    for nothing in (None, "", []):
        answer = await app.client.post("/api/embed", json={"model": "bert", "input": nothing})
        assert answer.json()["embeddings"] == []


async def test_the_older_embeddings_keep_their_length(app: Running) -> None:
    answer = await app.client.post("/api/embeddings", json={"model": "bert", "prompt": "a b"})
    vector = answer.json()["embedding"]
    assert math.hypot(*vector) != pytest.approx(1, abs=1e-3)
    empty = await app.client.post("/api/embeddings", json={"model": "bert"})
    assert empty.json() == {"embedding": []}


# --- listing ----------------------------------------------------------------------------------


async def test_tags_lists_usable_models_and_models_all(app: Running) -> None:
    tags = (await app.client.get("/api/tags")).json()["models"]
    assert [tag["name"] for tag in tags] == [
        "base:latest",
        "bert:latest",
        "chain:latest",
        "llama:latest",
    ]
    chain = tags[2]
    assert chain["model"] == chain["name"]
    assert re.fullmatch("[0-9a-f]{64}", chain["digest"])
    assert {"format", "family", "parameter_size", "quantization_level"} <= chain["details"].keys()
    models = (await app.client.get("/api/models")).json()["models"]
    broken = next(model for model in models if model["name"] == "broken:latest")
    assert "web page" in broken["error"]
    assert len(models) == len(tags) + 1


async def test_ps_shows_the_placement_with_predicted_and_real_bytes(app: Running) -> None:
    await app.client.post("/api/generate", json={"model": "chain", "keep_alive": "1h"})
    models = (await app.client.get("/api/ps")).json()["models"]
    chain = next(model for model in models if model["name"] == "chain:latest")
    assert chain["size_vram"] == 0
    assert chain["context_length"] == 2048
    assert chain["state"] == "ready"
    host = chain["placement"]["host"]
    assert chain["size"] == host["real"]["total_bytes"] > 0
    assert host["real"]["kv_bytes"] == host["kv_bytes"] > 0
    assert chain["placement"]["mode"] == "cpu"


async def test_ps_says_for_ever_as_a_far_date(app: Running) -> None:
    await app.client.post("/api/generate", json={"model": "chain", "keep_alive": -1})
    models = (await app.client.get("/api/ps")).json()["models"]
    assert max(int(model["expires_at"][:4]) for model in models) > 2300


@pytest.mark.parametrize("key", ["model", "name"])
async def test_show(app: Running, key: str) -> None:
    """Continue sends `name` and looks for .Suffix in the template."""
    shown = (await app.client.post("/api/show", json={key: "chain"})).json()
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["model_info"]["llama.context_length"] == 4096
    assert shown["model_info"]["tokenizer.ggml.tokens"] == []
    assert "tokenizer.chat_template" not in shown["model_info"]
    assert ".Suffix" in shown["template"]
    assert "insert" in shown["capabilities"]
    assert shown["modelfile"].startswith('# Modelfile generated by "ollama show"\n')
    # Its file brings it; with the mark for editors in it, it would be another one.
    assert "TEMPLATE" not in shown["modelfile"]
    assert shown["template_problem"] == ""
    verbose = await app.client.post("/api/show", json={key: "chain", "verbose": True})
    assert len(verbose.json()["model_info"]["tokenizer.ggml.tokens"]) == 512
    assert (await app.client.post("/api/show", json={"name": "bert"})).json()["capabilities"] == [
        "embedding"
    ]


async def test_copilot_sees_the_name_that_it_asked_for(app: Running) -> None:
    headers = {"User-Agent": "GitHubCopilotChat/0.30.0"}
    shown = await app.client.post("/api/show", json={"model": "chain"}, headers=headers)
    assert shown.json()["model_info"]["general.basename"] == "chain"


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "model is required"),
        ({"model": ""}, 400, "model is required"),
        ({"model": "../x", "prompt": "x"}, 400, "invalid model name"),
        ({"model": "nix", "prompt": "x"}, 404, "model 'nix' not found"),
        ({"model": "nix", "prompt": "x", "stream": True}, 404, "model 'nix' not found"),
        ({"model": "qwen3:8b", "prompt": "x"}, 404, "`shimpy pull qwen3:8b` brings it"),
        ({"model": "broken", "prompt": "x"}, 422, "web page"),
        ({"model": "bert", "prompt": "x"}, 400, '"bert:latest" does not support generate'),
        ({"model": "chain", "prompt": "x", "think": True}, 400, "does not support thinking"),
        ({"model": "chain", "prompt": "x", "think": "very"}, 400, "invalid think value"),
        ({"model": "chain", "prompt": "x", "images": ["aGk="]}, 400, "does not support vision"),
        ({"model": "chain", "prompt": "x", "images": ["?"]}, 400, "not valid base64"),
        ({"model": "chain", "prompt": "x", "format": "xml"}, 400, "invalid format"),
        ({"model": "chain", "prompt": "x", "keep_alive": "5"}, 400, "keep_alive"),
        ({"model": "chain", "prompt": "x", "keep_alive": []}, 400, "keep_alive"),
        ({"model": "chain", "raw": True, "system": "x"}, 400, "raw mode does not support"),
        ({"model": "chain", "prompt": "x", "context": [-1]}, 400, '"context[0]"'),
        ({"model": "chain", "prompt": "x", "options": {"num_ctx": "1"}}, 400, '"num_ctx" must'),
        ({"model": "chain", "prompt": "x", "template": "{{ .Nope }}"}, 400, "template"),
        ({"model": "chain", "prompt": "x", "template": "{% for"}, 400, "template"),
        ({"model": "chain", "messages": [{"role": "boss"}]}, 400, "invalid role"),
        ({"model": "chain", "prompt": "word " * 4000}, 400, "2048"),
    ],
)
async def test_errors_have_a_status_and_a_text(
    app: Running, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await app.client.post("/api/generate", json=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]


async def test_chat_with_an_embedding_model_is_refused(app: Running) -> None:
    body = {"model": "bert", "messages": [{"role": "user", "content": "x"}]}
    answer = await app.client.post("/api/chat", json=body)
    assert answer.status_code == 400
    assert "does not support chat" in answer.json()["error"]


# --- who may ask ------------------------------------------------------------------------------


async def test_a_foreign_host_or_origin_is_refused(app: Running) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        answer = await app.client.get("/api/tags", headers=headers)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


async def test_an_editors_web_view_may_ask_from_its_own_origin(app: Running) -> None:
    origin = {"Origin": "vscode-webview://abc"}
    answer = await app.client.get("/api/tags", headers=origin)
    assert answer.headers["access-control-allow-origin"] == origin["Origin"]
    preflight = await app.client.options(
        "/api/chat", headers=origin | {"Access-Control-Request-Headers": "content-type"}
    )
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == "content-type"


async def test_the_request_id_comes_back(app: Running) -> None:
    answer = await app.client.get("/", headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    strange = await app.client.get("/", headers={"X-Request-Id": 'a"b c'})
    assert re.fullmatch("[0-9a-f]{16}", strange.headers["x-request-id"])
    assert answer.headers["server"].startswith("shimpy/")


async def test_models_come_and_go_without_a_restart(app: Running, tmp_path: Path) -> None:
    registry = app.services.registry
    chain: Model = await registry.resolve("chain")
    names = {str(model.name) for model in await registry.models()}
    new = chain.path.with_name("newcomer-Q8_0.gguf")
    shutil.copy(chain.path, new)
    try:
        answer = await app.client.post("/api/show", json={"model": "newcomer"})
        assert answer.status_code == 200
        listed = {model["name"] for model in (await app.client.get("/api/tags")).json()["models"]}
        assert listed == (names - {"broken:latest"}) | {"newcomer:q8_0"}
    finally:
        new.unlink()
    assert (await app.client.post("/api/show", json={"model": "newcomer"})).status_code == 404
    listed = {model["name"] for model in (await app.client.get("/api/tags")).json()["models"]}
    assert "newcomer:q8_0" not in listed


async def test_lines_parse_alone(app: Running) -> None:
    """gen.nvim reads one JSON object per line, whatever the chunks of the transport are."""
    body = {"model": "chain", "prompt": "x"}
    async with app.client.stream("POST", "/api/generate", json=body) as answer:
        async for line in answer.aiter_lines():
            msgspec.json.decode(line)
