"""Ollama's routes: bodies parsed by `requests`, answers formed by `answers` and `listing`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import hdrs, web

import shimpy
from shimpy.errors import UnsupportedError
from shimpy.gguf.reader import read_files
from shimpy.server.bodies import read_body
from shimpy.server.embedding import encode_each, run_embedding
from shimpy.server.events import Event
from shimpy.server.generation import find_model, load_model, run_generation, unload_model
from shimpy.server.ollama import answers, listing, residents
from shimpy.server.ollama.requests import (
    parse_chat,
    parse_embed,
    parse_embeddings,
    parse_generate,
    parse_model,
)
from shimpy.server.ollama.wire import (
    ChatBody,
    ChatChunk,
    EmbedAnswer,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    GenerateChunk,
    ShowBody,
    format_local_time,
    measured_ns,
    to_ns,
)
from shimpy.server.planning import plan_model
from shimpy.server.record import Record, record_of
from shimpy.server.requests import ChatPrompt, GenerationRequest, PlainPrompt
from shimpy.server.services import Services, services_of
from shimpy.server.streaming import (
    NDJSON,
    SSE,
    StreamForm,
    json_response,
    ndjson_line,
    sse_data,
    stream_chunks,
)

_NDJSON_FORM = StreamForm(
    content_type=NDJSON, error_chunk=lambda error: ndjson_line({"error": error.message})
)
_BARE_TEXT_FORM = StreamForm(
    content_type=SSE, error_chunk=lambda error: sse_data(f"[ERROR] {error.message}")
)
_DONE = sse_data("[DONE]")
_COPILOT = "GitHubCopilotChat/"
# Whose API this package speaks. Clients refuse older ones: Copilot those before 0.6.4.
_OLLAMA_VERSION = "0.33.0"


async def root(_: web.Request) -> web.Response:
    """GET /: Ollama's command line takes this for a sign of life."""
    return web.Response(text="Ollama is running")


async def version(_: web.Request) -> web.Response:
    """GET /api/version: the Ollama that this is like, in three plain numbers; and shimpy's own."""
    return json_response({"version": _OLLAMA_VERSION, "shimpy": shimpy.__version__})


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /api/generate, in Ollama's form and in the older native one."""
    services, record = services_of(request), record_of(request)
    body = await read_body(request, GenerateBody)
    asked = parse_generate(body)
    if is_empty(asked):
        reason = await load_or_unload(services, asked, record)
        return json_response(answers.idle_generate(asked.model, reason))
    events = run_generation(services, asked, record)
    if body.stream is not False and _wants_sse(request):
        return await stream_chunks(request, _bare_text(events), _BARE_TEXT_FORM)
    chunks = answers.generate_chunks(events, model=asked.model, wants_context=not body.raw)
    if body.stream is False:
        return json_response(await answers.whole_generate(chunks))
    return await stream_chunks(request, _lines(chunks), _NDJSON_FORM)


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /api/chat."""
    services, record = services_of(request), record_of(request)
    body = await read_body(request, ChatBody)
    asked = parse_chat(body)
    if is_empty(asked):
        reason = await load_or_unload(services, asked, record)
        return json_response(answers.idle_chat(asked.model, reason))
    chunks = answers.chat_chunks(run_generation(services, asked, record), model=asked.model)
    if body.stream is False:
        return json_response(await answers.whole_chat(chunks))
    return await stream_chunks(request, _lines(chunks), _NDJSON_FORM)


async def embed(request: web.Request) -> web.Response:
    """POST /api/embed: one vector of length 1 for each input."""
    asked = parse_embed(await read_body(request, EmbedBody))
    found = await run_embedding(services_of(request), asked, record_of(request))
    return json_response(
        EmbedAnswer(
            model=asked.model,
            embeddings=await encode_each(vector.tolist() for vector in found.vectors),
            total_duration=to_ns(found.total_s),
            load_duration=measured_ns(found.load_s),
            prompt_eval_count=found.n_tokens,
        )
    )


async def embeddings(request: web.Request) -> web.Response:
    """POST /api/embeddings: the vector of one text, as the model gives it."""
    asked = parse_embeddings(await read_body(request, EmbeddingsBody))
    found = await run_embedding(services_of(request), asked, record_of(request))
    vector = found.vectors[0].tolist() if found.vectors else []
    return json_response({"embedding": vector})


async def tags(request: web.Request) -> web.Response:
    """GET /api/tags: the models that can be used."""
    models = await services_of(request).registry.models()
    usable = [model for model in models if model.error is None]
    return json_response({"models": [listing.tag_entry(model) for model in usable]})


async def ps(request: web.Request) -> web.Response:
    """GET /api/ps: the loaded models, and why others are not.

    Those that wait for memory or are held back, the last that were unloaded, and the cards that
    lie idle because of the build.
    """
    services = services_of(request)
    scheduler = services.scheduler
    return json_response(
        {
            "models": residents.resident_entries(scheduler.residents()),
            "waiting": scheduler.waiting(),
            "recent": residents.recent_entries(scheduler.history()),
            "unusable_gpus": services.machine.unusable_gpus,
        }
    )


async def show(request: web.Request) -> web.Response:
    """POST /api/show: what a model is and can do, and where it would be placed here."""
    services = services_of(request)
    body = await read_body(request, ShowBody)
    name = parse_model(body.model, body.name)
    model = await find_model(services, name, record_of(request))
    header = await asyncio.to_thread(read_files, model.files)
    card = await services.cards.get(model)
    info = listing.model_info(model, header, verbose=bool(body.verbose))
    if request.headers.get(hdrs.USER_AGENT, "").startswith(_COPILOT):
        # Copilot names the model in its picker by this key.
        info["general.basename"] = name
    return json_response(
        {
            "license": model.settings.license or str(header.metadata.get("general.license", "")),
            "modelfile": listing.modelfile(model),
            **listing.shown_settings(model),
            "template": listing.shown_template(model, card.template),
            "template_problem": card.template.problem,
            "details": {
                **listing.details(model),
                "parent_model": listing.parent_of(services.store.manifest(model.name)),
            },
            "model_info": info,
            "tensors": listing.tensor_rows(header),
            "capabilities": listing.capabilities(model, card.template),
            "modified_at": format_local_time(model.modified_s),
            "experts": listing.experts(model),
            "source": model.source,
            "files": [str(path) for path in model.files],
            "aliases": [str(alias) for alias in model.aliases],
            "plan": await plan_model(services, model),
        }
    )


async def push(_: web.Request) -> web.Response:
    """POST /api/push: not supported."""
    raise UnsupportedError("push is not supported: shimpy pulls models and publishes none")


ROUTES = [
    web.get("/", root),
    web.get("/api/version", version),
    web.post("/api/generate", generate),
    web.post("/api/chat", chat),
    web.post("/api/embed", embed),
    web.post("/api/embeddings", embeddings),
    web.get("/api/tags", tags),
    web.get("/api/ps", ps),
    web.post("/api/show", show),
    web.post("/api/push", push),
]


def is_empty(asked: GenerationRequest) -> bool:
    """Whether there is nothing to answer, so that the model is only to be loaded or unloaded."""
    match asked.prompt:
        case PlainPrompt(text=text):
            return not text
        case ChatPrompt(messages=messages):
            return not messages
        case _:
            return False


async def load_or_unload(services: Services, asked: GenerationRequest, record: Record) -> str:
    """Load or, where nothing of it is to stay, unload a model; return the word for that."""
    if asked.keep_alive_s == 0:
        await unload_model(services, asked.model, record)
        return "unload"
    await load_model(services, asked, record)
    return "load"


def _wants_sse(request: web.Request) -> bool:
    return SSE in request.headers.get(hdrs.ACCEPT, "").lower()


async def _lines(
    chunks: AsyncGenerator[GenerateChunk, None] | AsyncGenerator[ChatChunk, None],
) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield ndjson_line(chunk)


async def _bare_text(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(answers.bare_text(events)) as texts:
        async for text in texts:
            yield sse_data(text)
    yield _DONE
