"""The one path of ranking, in no dialect: a query and documents in, a score for each out."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import msgspec

from shimpy.errors import UnsupportedError
from shimpy.protocol.messages import Between, PromptPart, Text
from shimpy.server.embedding import split_vectors
from shimpy.server.generation import acquire, find_model
from shimpy.server.options import Options
from shimpy.server.record import Record
from shimpy.server.services import Services

_PLACES = re.compile(r"(\{query\}|\{document\})")


class RankingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Documents to be compared with a query."""

    model: str
    query: str
    documents: tuple[str, ...]
    options: Options = msgspec.field(default_factory=Options)
    keep_alive_s: float | None = None


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """How well each document fits, in their order; higher is better, on the model's own scale."""

    scores: tuple[float, ...]
    n_tokens: int
    total_s: float


async def run_ranking(services: Services, request: RankingRequest, record: Record) -> Ranking:
    """Return the scores of a request's documents.

    A document that is too long is cut, unless the model ranks by a prompt: that is an error.

    Raises:
        UnsupportedError: the model does not rank.
        ShimpyError: as for a generation.
    """
    arrived_s = time.monotonic()
    model = await find_model(services, request.model, record)
    if model.shape is None or not model.shape.is_reranker:
        raise UnsupportedError(f'"{model.name}" does not support rerank: it is no ranking model')
    card = await services.cards.get(model)
    prompt = card.rank_prompt
    inputs = [rank_parts(request.query, document, prompt) for document in request.documents]
    async with acquire(services, model, request.options, request.keep_alive_s, record) as lease:
        answer = await lease.embed(
            inputs, truncate=not prompt, normalize=False, add_special=not prompt
        )
    record.n_prompt, record.outcome = answer.n_tokens, "stop"
    return Ranking(
        # Of several outputs the first is the score (llama.cpp, send_rerank).
        scores=tuple(vector[0] for vector in split_vectors(answer)),
        n_tokens=answer.n_tokens,
        total_s=time.monotonic() - arrived_s,
    )


def rank_parts(query: str, document: str, prompt: str) -> Sequence[PromptPart]:
    """Return what a model reads to compare the two; `prompt` is its own, "": it has none."""
    if not prompt:
        return [Text(query), Between(), Text(document)]
    texts = {"{query}": Text(query), "{document}": Text(document)}
    pieces = (piece for piece in _PLACES.split(prompt) if piece)
    return [texts.get(piece) or Text(piece, parse_special=True) for piece in pieces]
