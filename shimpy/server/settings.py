"""A model's lasting settings, put under what a request asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec
from msgspec.structs import replace

from shimpy.chat.messages import ChatMessage
from shimpy.errors import InvalidOptionError
from shimpy.placement.placement import PlanOptions
from shimpy.registry.model import Model
from shimpy.registry.settings import ModelSettings
from shimpy.server.ollama.options import parse_options
from shimpy.server.options import Options
from shimpy.server.requests import ChatPrompt, GenerationRequest

_SYSTEM_ROLES = frozenset({"system", "developer"})


def with_settings(request: GenerationRequest, model: Model) -> GenerationRequest:
    """Return a request with what it leaves open taken from the model's settings.

    Its system message comes first unless the conversation has one of its own; its messages come
    before the conversation's, but not where that goes on from an earlier answer's context.
    A single prompt may be set to go to the model as it is. A model's template is part of its card.
    """
    settings = model.settings
    if settings.is_empty:
        return request
    options = request.options.over(options_of(settings))
    prompt = request.prompt
    if isinstance(prompt, ChatPrompt) and prompt.messages:
        prompt = replace(
            prompt, messages=tuple(_opened(prompt, settings)), is_raw=bool(settings.raw)
        )
    return replace(request, options=options, prompt=prompt)


def options_of(settings: ModelSettings) -> Options:
    """Return a model's parameters as options.

    They may come from another tool's store: one that makes no sense is left out, as if it were
    not there.
    """
    if not settings.parameters:
        return Options()
    return _parse_lenient(msgspec.json.encode(settings.parameters))


@lru_cache(maxsize=128)
def _parse_lenient(parameters: bytes) -> Options:
    """Return JSON parameters as options; each request asks for its model's, which stay the same."""
    options = Options()
    for name, value in msgspec.json.decode(parameters).items():
        try:
            options = parse_options({name: value}).over(options)
        except InvalidOptionError:
            continue
    return options


def plan_options(model: Model, asked: PlanOptions | None = None) -> PlanOptions:
    """Return how a model is to be loaded: what was asked for, else what is set about it."""
    asked = asked or PlanOptions()
    settings = model.settings
    if settings.is_empty:
        return asked
    options = options_of(settings)
    cpu_moe = asked.cpu_moe
    if cpu_moe == "auto" and settings.cpu_moe is not None:
        cpu_moe = settings.cpu_moe
    n_gpu_layers = asked.n_gpu_layers
    return replace(
        asked,
        n_ctx=asked.n_ctx or options.n_ctx,
        n_gpu_layers=options.n_gpu_layers if n_gpu_layers is None else n_gpu_layers,
        cpu_moe=cpu_moe,
    )


def keep_alive_of(model: Model, asked_s: float | None) -> float | None:
    """Return the seconds that an idle model stays loaded; None: as the config says."""
    return model.settings.keep_alive_s if asked_s is None else asked_s


def _opened(prompt: ChatPrompt, settings: ModelSettings) -> Sequence[ChatMessage]:
    """Return a conversation with what every conversation with the model begins with."""
    own = list(prompt.messages)
    has_system = own[0].role in _SYSTEM_ROLES
    opening = [own.pop(0)] if has_system else []
    if settings.system and not has_system:
        opening = [ChatMessage(role="system", content=settings.system)]
    if settings.messages and not prompt.context:
        opening += [ChatMessage(role=m.role, content=m.content) for m in settings.messages]
    return [*opening, *own]
