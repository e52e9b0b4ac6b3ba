"""POST /v1/embeddings and GET /v1/models over HTTP."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from typing import Any

import pytest

from shimpy.errors import UserError
from shimpy.server.embedding import MAX_NUMBERS, check_size
from tests.server.harness import Running
from tests.synthetic import CHAIN_TEXT

pytestmark = pytest.mark.asyncio(loop_scope="package")

PATH = "/v1/embeddings"


async def post(app: Running, **body: Any) -> dict[str, Any]:
    answer = await app.client.post(PATH, json={"model": "bert", "input": "a b"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_one_vector_of_length_one_for_each_input(app: Running) -> None:
    answer = await post(app, input=["a b", "c"])
    assert answer["object"] == "list"
    assert answer["model"] == "bert"
    assert [item["index"] for item in answer["data"]] == [0, 1]
    for item in answer["data"]:
        assert math.hypot(*item["embedding"]) == pytest.approx(1)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] > 2
    one = await post(app)
    assert one["data"][0]["embedding"] == pytest.approx(answer["data"][0]["embedding"], abs=1e-4)


async def test_base64_is_little_endian_float32(app: Running) -> None:
    """What OpenAI's own SDKs ask for unless told otherwise."""
    plain = (await post(app, encoding_format="float"))["data"][0]["embedding"]
    packed = base64.b64decode((await post(app, encoding_format="base64"))["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(plain)}f", packed)) == pytest.approx(plain)


async def test_fewer_dimensions_are_normalised_anew(app: Running) -> None:
    whole = (await post(app))["data"][0]["embedding"]
    cut = (await post(app, dimensions=8))["data"][0]["embedding"]
    length = math.hypot(*whole[:8])
    assert cut == pytest.approx([number / length for number in whole[:8]], abs=1e-5)


async def test_tokens_are_inputs_too(app: Running) -> None:
    both = await post(app, input=[[5, 6], [7]])
    one = await post(app, input=[5, 6])
    assert len(both["data"]) == 2
    assert len(one["data"]) == 1
    assert one["data"][0]["embedding"] == pytest.approx(both["data"][0]["embedding"], abs=1e-4)


async def test_many_inputs_go_to_the_worker_in_parts(app: Running) -> None:
    """Errors name an input by its place in the whole request."""
    texts = [f"number {i % 11}" for i in range(600)]
    found = [item["embedding"] for item in (await post(app, input=texts))["data"]]
    assert len(found) == 600
    for i in (255, 256, 599):
        assert found[i] == pytest.approx(found[i % 11], abs=2e-3)
    texts[500] = "word " * 5000
    refused = await app.client.post(PATH, json={"model": "bert", "input": texts})
    assert "input 500 has" in refused.json()["error"]["message"]


async def test_an_answer_of_too_many_numbers_is_refused_by_its_inputs() -> None:
    check_size(MAX_NUMBERS // 8192, 8192)
    with pytest.raises(UserError, match="send at most 16384 inputs"):
        check_size(16385, 1024)


@pytest.mark.parametrize("model", ["chain", "llama"])
async def test_a_model_that_generates_embeds_too_at_the_same_time(app: Running, model: str) -> None:
    """One worker does both, and bad lengths cost nobody anything."""
    texts = [f"text number {i} " * (i % 7) for i in range(40)]
    story = {"model": model, "prompt": "a story", "max_tokens": 60}
    told, embedded, refused = await asyncio.gather(
        app.client.post("/v1/completions", json=story),
        app.client.post(PATH, json={"model": model, "input": texts}),
        app.client.post(PATH, json={"model": model, "input": ["word " * 5000]}),
    )
    (choice,) = told.json()["choices"]
    assert choice["text"] == CHAIN_TEXT or model == "llama"
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    found = [item["embedding"] for item in embedded.json()["data"]]
    assert len(found) == 40
    for i in (0, 5, 39):
        one = (await post(app, model=model, input=texts[i]))["data"][0]["embedding"]
        assert one == pytest.approx(found[i], abs=2e-3)
        assert math.hypot(*one) == pytest.approx(1)
    loaded = [entry["name"] for entry in (await app.client.get("/api/ps")).json()["models"]]
    assert loaded.count(f"{model}:latest") == 1


async def test_a_text_over_the_context_is_an_error_unless_it_may_be_cut(app: Running) -> None:
    long = {"model": "bert", "input": ["short", "word " * 5000]}
    refused = await app.client.post(PATH, json=long)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "input 1" in refused.json()["error"]["message"]
    assert len((await post(app, **long, truncate=True))["data"]) == 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"encoding_format": "int8"}, "encoding_format must be float or base64"),
        ({"input": None}, "input is required"),
        ({"input": []}, "input is required"),
        ({"input": ["a", 1]}, '"input[1]"'),
        ({"input": ["a"] * 2049}, "2048"),
        ({"input": [100_000]}, "100000"),
        ({"dimensions": 100_000}, "dimensions must be from 1"),
        ({"dimensions": 0}, "dimensions must be from 1"),
        ({"model": None}, "model is required"),
    ],
)
async def test_errors_name_what_is_wrong(app: Running, body: dict[str, Any], words: str) -> None:
    if "model" in body:
        await app.unload_all()
    answer = await app.client.post(PATH, json={"model": "bert", "input": "a b"} | body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


async def test_models_are_listed_and_found_by_name(app: Running) -> None:
    listed = (await app.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    names = [model["id"] for model in listed["data"]]
    assert "chain:latest" in names
    entry = listed["data"][names.index("chain:latest")]
    assert entry["object"] == "model"
    assert entry["owned_by"] == "library"
    assert entry["created"] > 1_600_000_000
    found = (await app.client.get("/v1/models/chain")).json()
    assert found == entry | {"id": "chain"}
    missing = await app.client.get("/v1/models/some/where:else")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"].startswith("model 'some/where:else' not found")
