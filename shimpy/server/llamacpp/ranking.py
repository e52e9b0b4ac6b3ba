"""llama.cpp's /v1/rerank, in Jina's form and in that of Text Embeddings Inference (TEI)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from shimpy.errors import InvalidOptionError
from shimpy.server.bodies import read_body
from shimpy.server.choosing import RANKING, choose_model
from shimpy.server.llamacpp.wire import RerankBody
from shimpy.server.ollama.options import parse_options
from shimpy.server.ollama.wire import parse_keep_alive
from shimpy.server.ranking import Ranking, RankingRequest, run_ranking
from shimpy.server.record import record_of
from shimpy.server.services import services_of
from shimpy.server.streaming import json_response

_MAX_DOCUMENTS = 2048


async def rerank(request: web.Request) -> web.Response:
    """POST /v1/rerank: documents with their scores, the best first."""
    body = await read_body(request, RerankBody)
    services = services_of(request)
    asked = parse_rerank(body, await choose_model(services, body.model, RANKING))
    found = await run_ranking(services, asked, record_of(request))
    return json_response(rank_answer(asked, found, body))


ROUTES = [
    web.post("/rerank", rerank),
    web.post("/reranking", rerank),
    web.post("/v1/rerank", rerank),
    web.post("/v1/reranking", rerank),
]


def parse_rerank(body: RerankBody, model: str) -> RankingRequest:
    """Return what a body asks for.

    Raises:
        UserError: the message names what is wrong.
    """
    if body.query is None:
        raise InvalidOptionError('"query" is required', option="query")
    documents = body.texts if body.documents is None else body.documents
    if not documents or len(documents) > _MAX_DOCUMENTS:
        raise InvalidOptionError(
            f'"documents" must hold 1 to {_MAX_DOCUMENTS} texts, not {len(documents or [])}',
            option="documents",
        )
    if body.top_n is not None and body.top_n < 1:
        raise InvalidOptionError(
            f'"top_n" must be at least 1, not {str(body.top_n)[:40]}', option="top_n"
        )
    return RankingRequest(
        model=model,
        query=body.query,
        documents=tuple(_text(document, i) for i, document in enumerate(documents)),
        options=parse_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
    )


def rank_answer(asked: RankingRequest, found: Ranking, body: RerankBody) -> Any:
    """Return the documents in the form that the body is in; texts only where they are wanted."""
    is_tei = body.documents is None
    label = "score" if is_tei else "relevance_score"
    order = sorted(enumerate(found.scores), key=lambda ranked: -ranked[1])
    results: list[dict[str, Any]] = []
    for index, score in order[: body.top_n]:
        entry: dict[str, Any] = {"index": index, label: score}
        if is_tei and body.return_text:
            entry["text"] = asked.documents[index]
        elif not is_tei and body.return_documents:
            entry["document"] = {"text": asked.documents[index]}
        results.append(entry)
    if is_tei:
        return results
    usage = {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens}
    return {"model": asked.model, "object": "list", "usage": usage, "results": results}


def _text(document: str | dict[str, Any], index: int) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise InvalidOptionError(f'"documents[{index}]" has no text', option="documents")
    return text
