"""OpenAI's routes: bodies parsed by `requests`, answers formed by `chat` and `completions`."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from shimpy.protocol.messages import Tokenized
from shimpy.registry.model import Model
from shimpy.server.anthropic.listing import VERSION_HEADER, anthropic_entry, models_page
from shimpy.server.bodies import read_body
from shimpy.server.choices import check_choices, run_choices
from shimpy.server.choosing import EMBEDDING, GENERATING, choose_model
from shimpy.server.embedding import encode_each, run_embedding
from shimpy.server.errors import openai_error
from shimpy.server.generation import acquire, find_model
from shimpy.server.openai.answers import Head, new_id, now_s, sse_lines
from shimpy.server.openai.chat import chat_chunks, whole_chat
from shimpy.server.openai.completions import completion_chunks, whole_completion
from shimpy.server.openai.requests import (
    Completions,
    parse_chat,
    parse_completion,
    parse_embedding,
)
from shimpy.server.openai.responses import routes as responses
from shimpy.server.openai.wire import ChatBody, CompletionBody, EmbeddingBody
from shimpy.server.record import record_of
from shimpy.server.requests import GenerationRequest, PlainPrompt, TokenPrompt
from shimpy.server.services import services_of
from shimpy.server.streaming import SSE, StreamForm, json_response, sse_json, stream_chunks

SSE_FORM = StreamForm(content_type=SSE, error_chunk=lambda error: sse_json(openai_error(error)))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    body = await read_body(request, ChatBody)
    body.model = await choose_model(services_of(request), body.model, GENERATING)
    asked = parse_chat(body)
    head = _head(asked, "chatcmpl-", "chat.completion")
    check_choices(len(asked.requests), asked.n)
    events = run_choices(services_of(request), asked.requests, asked.n, record_of(request))
    if asked.stream:
        chunks = sse_lines(chat_chunks(events, head, n=asked.n))
        return await stream_chunks(request, chunks, SSE_FORM)
    return json_response(await whole_chat(events, head, n=asked.n))


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions: text as it is, in no template."""
    body = await read_body(request, CompletionBody)
    body.model = await choose_model(services_of(request), body.model, GENERATING)
    asked = parse_completion(body)
    head = _head(asked, "cmpl-", "text_completion")
    check_choices(len(asked.requests), asked.n)
    echoes = [await _echo(request, one) if asked.echo else "" for one in asked.requests]
    events = run_choices(services_of(request), asked.requests, asked.n, record_of(request))
    if asked.stream:
        chunks = sse_lines(completion_chunks(events, head, echoes=echoes, n=asked.n))
        return await stream_chunks(request, chunks, SSE_FORM)
    return json_response(await whole_completion(events, head, echoes=echoes, n=asked.n))


async def embeddings(request: web.Request) -> web.Response:
    """POST /v1/embeddings: one vector of length 1 for each input."""
    body = await read_body(request, EmbeddingBody)
    body.model = await choose_model(services_of(request), body.model, EMBEDDING)
    asked, is_base64 = parse_embedding(body)
    found = await run_embedding(services_of(request), asked, record_of(request))
    data = await encode_each(
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if is_base64 else vector.tolist(),
        }
        for index, vector in enumerate(found.vectors)
    )
    usage = {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens}
    return json_response({"object": "list", "data": data, "model": asked.model, "usage": usage})


async def models(request: web.Request) -> web.Response:
    """GET /v1/models: the models that can be used; in Anthropic's form for its clients."""
    found = await services_of(request).registry.models()
    usable = [model for model in found if model.error is None]
    if VERSION_HEADER in request.headers:
        return json_response(models_page(usable))
    return json_response({"object": "list", "data": [model_entry(model) for model in usable]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}, whose name may hold slashes."""
    name = request.match_info["model"]
    found = await find_model(services_of(request), name, record_of(request))
    if VERSION_HEADER in request.headers:
        return json_response(anthropic_entry(found) | {"id": name})
    return json_response(model_entry(found) | {"id": name})


def model_entry(found: Model) -> dict[str, Any]:
    """Return a model as OpenAI lists it; its owner is what its name says."""
    namespace, slash, _ = found.name.name.rpartition("/")
    return {
        "id": str(found.name),
        "object": "model",
        "created": int(found.modified_s),
        "owned_by": namespace if slash else "library",
    }


ROUTES = [
    web.post("/v1/chat/completions", chat_completions),
    web.post("/v1/completions", completions),
    web.post("/v1/embeddings", embeddings),
    web.get("/v1/models", models),
    web.get("/v1/models/{model:.+}", model),
    *responses.ROUTES,
]


def _head(asked: Completions, prefix: str, kind: str) -> Head:
    is_chunk = asked.stream and kind == "chat.completion"
    return Head(
        id=new_id(prefix),
        created=now_s(),
        model=asked.model,
        object=f"{kind}.chunk" if is_chunk else kind,
        wants_usage=asked.wants_usage,
    )


async def _echo(request: web.Request, asked: GenerationRequest) -> str:
    """Return the text of a prompt."""
    match asked.prompt:
        case PlainPrompt(text=text):
            return text
        case TokenPrompt(ids=ids):
            return (await _detokenized(request, asked, ids)).text
        case _:
            return ""


async def _detokenized(
    request: web.Request, asked: GenerationRequest, ids: Sequence[int]
) -> Tokenized:
    services, record = services_of(request), record_of(request)
    found = await find_model(services, asked.model, record)
    async with acquire(services, found, asked.options, asked.keep_alive_s, record) as lease:
        return await lease.tokenize(ids=ids)


def _base64(vector: array[float]) -> str:
    """Return a vector as OpenAI packs it: little-endian float32."""
    packed = vector
    if sys.byteorder == "big":
        packed = array("f", vector)
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")
