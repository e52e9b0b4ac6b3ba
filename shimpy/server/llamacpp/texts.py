"""llama.cpp's routes about text: tokens and back, templates, and vectors."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from shimpy.errors import InvalidOptionError
from shimpy.protocol.messages import PromptPart, Text, Tokenized, Tokens
from shimpy.scheduler.lease import Lease
from shimpy.server.bodies import read_body
from shimpy.server.choosing import ANYTHING, EMBEDDING, GENERATING, choose_model
from shimpy.server.embedding import encode_each, run_embedding
from shimpy.server.generation import acquire, find_model, prepare_request
from shimpy.server.llamacpp.requests import is_token, parse_embedding
from shimpy.server.llamacpp.wire import DetokenizeBody, EmbeddingBody, TokenizeBody
from shimpy.server.openai.requests import parse_chat
from shimpy.server.openai.wire import ChatBody
from shimpy.server.options import Options
from shimpy.server.record import record_of
from shimpy.server.services import services_of
from shimpy.server.streaming import json_response


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: the tokens of a text, or of a list of texts and tokens."""
    body = await read_body(request, TokenizeBody)
    services, record = services_of(request), record_of(request)
    model = await find_model(services, await choose_model(services, body.model, ANYTHING), record)
    async with acquire(services, model, Options(), None, record) as lease:
        found = await _tokenized(lease, body)
    record.outcome = "stop"
    if not body.with_pieces:
        return json_response({"tokens": found.ids})
    pieces = zip(found.ids, found.pieces, strict=True)
    return json_response({"tokens": [{"id": i, "piece": _shown(piece)} for i, piece in pieces]})


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: the text of tokens."""
    body = await read_body(request, DetokenizeBody)
    services, record = services_of(request), record_of(request)
    ids = body.tokens or []
    for i, token in enumerate(ids):
        if not is_token(token):
            raise InvalidOptionError(f'"tokens[{i}]" is no token: {token}', option="tokens")
    name = await choose_model(services, body.model, ANYTHING)
    model = await find_model(services, name, record)
    async with acquire(services, model, Options(), None, record) as lease:
        found = await lease.tokenize(ids=ids)
    record.outcome = "stop"
    return json_response({"content": found.text})


async def apply_template(request: web.Request) -> web.Response:
    """POST /apply-template: the prompt that POST /v1/chat/completions would make of its body."""
    body = await read_body(request, ChatBody)
    services, record = services_of(request), record_of(request)
    body.model = await choose_model(services, body.model, GENERATING)
    asked = parse_chat(body).requests[0]
    model = await find_model(services, asked.model, record)
    prepared = await prepare_request(services, model, asked)
    texts = [part.text for part in prepared.submit.prompt if isinstance(part, Text)]
    record.outcome = "stop"
    return json_response({"prompt": "".join(texts)})


async def embedding(request: web.Request) -> web.Response:
    """POST /embedding: one vector for each input."""
    body = await read_body(request, EmbeddingBody)
    services = services_of(request)
    asked = parse_embedding(body, await choose_model(services, body.model, EMBEDDING))
    found = await run_embedding(services, asked, record_of(request))
    # One for each token where a model does not pool: here all do.
    return json_response(
        await encode_each(
            {"index": index, "embedding": [vector.tolist()]}
            for index, vector in enumerate(found.vectors)
        )
    )


ROUTES = [
    web.post("/tokenize", tokenize),
    web.post("/detokenize", detokenize),
    web.post("/apply-template", apply_template),
    web.post("/embedding", embedding),
    web.post("/embeddings", embedding),
]


async def _tokenized(lease: Lease, body: TokenizeBody) -> Tokenized:
    content = body.content if body.content is not None else ""
    parse_special = body.parse_special is not False
    add_special, wants_pieces = bool(body.add_special), bool(body.with_pieces)
    if isinstance(content, str):
        return await lease.tokenize(
            content,
            add_special=add_special,
            parse_special=parse_special,
            wants_pieces=wants_pieces,
        )
    parts = [_part(item, i, parse_special=parse_special) for i, item in enumerate(content)]
    if not parts:
        return Tokenized(request=0, ids=[], text="")
    starts = add_special and isinstance(parts[0], Text)
    return await lease.tokenize(prompt=parts, add_special=starts, wants_pieces=wants_pieces)


def _part(item: Any, index: int, *, parse_special: bool) -> PromptPart:
    if isinstance(item, str):
        return Text(item, parse_special=parse_special)
    if is_token(item):
        return Tokens([item])
    raise InvalidOptionError(
        f'"content[{index}]" must be a text or the id of a token', option="content"
    )


def _shown(piece: bytes) -> str | list[int]:
    """Return a token as text, or as its bytes where they are no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
