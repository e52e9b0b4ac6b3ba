"""llama.cpp's routes about text, and its reports."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.server.harness import Running, running_app
from tests.synthetic import CHATML, write_bert, write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("texts")
    write_chain(folder / "chain.gguf")
    write_bert(folder / "bert.gguf")
    state = tmp_path_factory.mktemp("state")
    async with running_app(folder, state, default_model="chain") as running:
        yield running


async def _post(app: Running, path: str, **body: Any) -> Any:
    answer = await app.client.post(path, json={"model": "chain"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def _tokens(app: Running, content: Any, **fields: Any) -> list[Any]:
    tokens: list[Any] = (await _post(app, "/tokenize", content=content, **fields))["tokens"]
    return tokens


async def test_a_text_becomes_tokens_and_tokens_a_text(app: Running) -> None:
    text = "Hi, wörld! 🙂"
    tokens = await _tokens(app, text)
    assert (await _post(app, "/detokenize", tokens=tokens))["content"] == text
    assert await _tokens(app, "") == []
    assert (await _post(app, "/tokenize"))["tokens"] == []
    assert (await _post(app, "/detokenize"))["content"] == ""


async def test_start_tokens_are_added_when_asked_for(app: Running) -> None:
    plain = await _tokens(app, "hi")
    special = await _tokens(app, "hi", add_special=True)
    assert special[1:] == plain
    framed = await _tokens(app, "a", add_special=True, model="bert")
    # BERT has one at the end too.
    assert (framed[0], framed[-1]) == (2, 3)


async def test_control_tokens_are_parsed_unless_not_to_be(app: Running) -> None:
    (one,) = await _tokens(app, "<|im_start|>")
    assert len(await _tokens(app, "<|im_start|>", parse_special=False)) > 1
    pieces = await _tokens(app, "<|im_start|>", with_pieces=True)
    assert pieces == [{"id": one, "piece": "<|im_start|>"}]


async def test_pieces_that_are_no_characters_are_bytes(app: Running) -> None:
    pieces = [token["piece"] for token in await _tokens(app, "é", with_pieces=True)]
    assert pieces == [[0xC3], [0xA9]]


async def test_texts_and_tokens_can_be_mixed(app: Running) -> None:
    a, b = await _tokens(app, "ab"), await _tokens(app, "cd")
    assert await _tokens(app, [*a, "cd"]) == [*a, *b]
    assert await _tokens(app, ["ab", *b]) == [*a, *b]
    assert await _tokens(app, []) == []
    assert len(await _tokens(app, ["ab", *b], add_special=True)) == len(a) + len(b) + 1
    assert await _tokens(app, [*a, "cd"], add_special=True, with_pieces=False) == [*a, *b]


async def test_a_template_is_applied(app: Running) -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    answer = await app.client.post("/apply-template", json={"messages": messages})
    assert answer.json() == {
        "prompt": "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    }


async def test_embeddings_are_lists_of_vectors(app: Running) -> None:
    for path in ("/embedding", "/embeddings"):
        found = await _post(app, path, model="bert", content=["a b", "c"])
        assert [one["index"] for one in found] == [0, 1]
        assert all(math.hypot(*one["embedding"][0]) == pytest.approx(1) for one in found)
    (raw,) = await _post(app, "/embedding", model="bert", input="a b", embd_normalize=-1)
    assert math.hypot(*raw["embedding"][0]) != pytest.approx(1, abs=1e-3)
    ids = await _tokens(app, "a b", model="bert")
    (same,) = await _post(app, "/embedding", model="bert", content=ids)
    assert same["embedding"][0] == pytest.approx(found[0]["embedding"][0], abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {"content": 5}, 400, "content"),
        ("/tokenize", {"content": [None]}, 400, '"content[0]"'),
        ("/tokenize", {"content": [10**6]}, 400, "vocabulary"),
        ("/tokenize", {"content": [10**12]}, 400, '"content[0]"'),
        ("/detokenize", {"tokens": [-1]}, 400, "-1"),
        ("/detokenize", {"tokens": ["x"]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens"),
        ("/tokenize", {"model": "nix"}, 404, "nix"),
        ("/apply-template", {"messages": []}, 400, "messages"),
        ("/apply-template", {"messages": [{"role": "?"}]}, 400, "role"),
        ("/embedding", {"model": "bert"}, 400, "content"),
        ("/embedding", {"model": "bert", "content": ["a", ["b", 1]]}, 400, "mix"),
        ("/embedding", {"model": "bert", "content": "a", "embd_normalize": 1}, 400, "normalize"),
        ("/embedding", {"model": "bert", "content": "word " * 900}, 400, "tokens"),
    ],
)
async def test_errors_have_llamacpps_form(
    app: Running, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await app.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == status
    assert words in answer.json()["error"]["message"]


# --- reports ----------------------------------------------------------------------------------


async def test_props_tell_the_template_and_the_context(app: Running) -> None:
    await _tokens(app, "x")
    props = (await app.client.get("/props")).json()
    assert props["model_alias"] == "chain:latest"
    assert props["model_path"].endswith("chain.gguf")
    assert props["chat_template"] == CHATML
    assert props["default_generation_settings"]["n_ctx"] == 2048
    assert props["default_generation_settings"]["params"]["temperature"] == 0.8
    assert props["total_slots"] == 8
    assert (props["bos_token"], props["eos_token"]) == ("<s>", "</s>")
    assert props["is_sleeping"] is False


async def test_props_of_a_model_that_is_not_loaded_load_nothing(app: Running) -> None:
    await app.client.post("/api/generate", json={"model": "bert", "keep_alive": 0})
    props = (await app.client.get("/props", params={"model": "bert"})).json()
    assert props["is_sleeping"] is True
    assert props["default_generation_settings"]["n_ctx"] > 0
    assert (await app.client.get("/props", params={"model": "nix"})).status_code == 404


async def test_slots_are_those_of_the_loaded_models(app: Running) -> None:
    await _tokens(app, "x")
    slots = (await app.client.get("/slots", params={"model": "chain"})).json()
    assert [slot["id"] for slot in slots] == list(range(8))
    assert all(slot["n_ctx"] == 2048 and not slot["is_processing"] for slot in slots)
    every = (await app.client.get("/slots?fail_on_no_slot=1")).json()
    assert [slot for slot in every if slot["model"] == "chain:latest"] == slots
    missing = await app.client.get("/slots", params={"model": "nix"})
    assert missing.status_code == 404
