"""Ranking, with a small BERT that has a head for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shimpy.protocol.messages import Between, Text
from shimpy.server.ranking import rank_parts
from tests.server.harness import Running, running_app
from tests.synthetic import write_bert, write_chain, write_reranker

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENTS = ["a b c", "foo bar", "the end of it", "xyz"]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("ranking")
    write_reranker(folder / "ranker.gguf")
    write_bert(folder / "bert.gguf")
    write_chain(folder / "chain.gguf")
    async with running_app(folder, tmp_path_factory.mktemp("state")) as running:
        yield running


async def _rank(app: Running, path: str = "/v1/rerank", **body: Any) -> Any:
    answer = await app.client.post(path, json={"query": "what", "documents": DOCUMENTS} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v1/reranking", "/reranking"])
async def test_documents_come_by_their_score(app: Running, path: str) -> None:
    """Nobody names the model: it is the only one that ranks."""
    found = await _rank(app, path)
    assert list(found) == ["model", "object", "usage", "results"]
    assert (found["model"], found["object"]) == ("ranker:latest", "list")
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 10
    results = found["results"]
    assert sorted(result["index"] for result in results) == [0, 1, 2, 3]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4


async def test_a_score_depends_on_the_pair_alone(app: Running) -> None:
    """Not on what else is in the batch; but on query and document, and which is which."""
    scores = await _scores(app)
    for index, document in enumerate(DOCUMENTS):
        (alone,) = (await _rank(app, documents=[document]))["results"]
        assert alone["relevance_score"] == pytest.approx(scores[index], abs=1e-4)
    assert (await _scores(app, query="else"))[0] != pytest.approx(scores[0], abs=1e-4)
    (swapped,) = (await _rank(app, query=DOCUMENTS[0], documents=["what"]))["results"]
    assert swapped["relevance_score"] != pytest.approx(scores[0], abs=1e-4)


async def _scores(app: Running, **body: Any) -> dict[int, float]:
    results = (await _rank(app, **body))["results"]
    return {result["index"]: result["relevance_score"] for result in results}


async def test_the_best_with_their_texts(app: Running) -> None:
    whole = (await _rank(app))["results"]
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]
    best = (await _rank(app, documents=documents, top_n=2, return_documents=True))["results"]
    assert [one["index"] for one in best] == [one["index"] for one in whole[:2]]
    assert all(one["document"] == {"text": DOCUMENTS[one["index"]]} for one in best)


async def test_the_other_form(app: Running) -> None:
    """Text Embeddings Inference has texts, and a list for an answer."""
    found = await _rank(app, documents=None, texts=DOCUMENTS, return_text=True, top_n=3)
    assert len(found) == 3
    assert [set(one) for one in found] == [{"index", "score", "text"}] * 3
    assert all(one["text"] == DOCUMENTS[one["index"]] for one in found)


async def test_long_documents_are_cut(app: Running) -> None:
    assert len((await _rank(app, documents=["word " * 3000, "x"]))["results"]) == 2


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"query": None}, 400, "query"),
        ({"query": 5}, 400, "query"),
        ({"documents": []}, 400, "documents"),
        ({"documents": None}, 400, "documents"),
        ({"documents": [{"body": "x"}]}, 400, "documents[0]"),
        ({"documents": ["x"] * 3000}, 400, "2048"),
        ({"top_n": 0}, 400, "top_n"),
        ({"model": "bert"}, 400, "does not support rerank"),
        ({"model": "chain"}, 400, "does not support rerank"),
        ({"model": "nix"}, 404, "nix"),
    ],
)
async def test_errors_have_llamacpps_form(
    app: Running, body: dict[str, Any], status: int, words: str
) -> None:
    given = {"query": "what", "documents": DOCUMENTS} | body
    answer = await app.client.post("/v1/rerank", json=given)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == status
    assert words in answer.json()["error"]["message"]


async def test_what_ranks_neither_embeds_nor_writes(app: Running) -> None:
    embedded = await app.client.post("/api/embed", json={"model": "ranker", "input": "x"})
    assert embedded.status_code == 400
    written = await app.client.post("/api/generate", json={"model": "ranker", "prompt": "x"})
    assert written.status_code == 400


async def test_a_model_may_rank_by_a_prompt(app: Running, tmp_path: Path) -> None:
    """Its pieces are the prompt's, nothing is put round them, and nothing may be cut off."""
    prompt = "find {query} in {document} or not"
    write_reranker(tmp_path / "prompted.gguf", rank_prompt=prompt)
    async with running_app(tmp_path, tmp_path) as other:
        prompted = await _rank(other, query="a", documents=["b"])
        plain = await _rank(app, query="a", documents=["b"])
        assert prompted["usage"]["total_tokens"] != plain["usage"]["total_tokens"]
        body = {"query": "a", "documents": ["word " * 3000]}
        answer = await other.client.post("/rerank", json=body)
        assert answer.status_code == 400
        assert "512" in answer.json()["error"]["message"]


async def test_nothing_in_a_document_is_part_of_the_prompt() -> None:
    """Nor in a query: neither as a place nor as a control token."""
    parts = rank_parts("{document}", "{query}", "Q: {query} D: {document}<end>")
    assert parts == [
        Text("Q: ", parse_special=True),
        Text("{document}"),
        Text(" D: ", parse_special=True),
        Text("{query}"),
        Text("<end>", parse_special=True),
    ]
    assert rank_parts("q", "d", "") == [Text("q"), Between(), Text("d")]
