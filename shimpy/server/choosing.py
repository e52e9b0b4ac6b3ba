"""Which model a request is for that names none, as llama.cpp's server has but one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from shimpy.errors import InvalidOptionError, NotFoundError, RegistryError
from shimpy.gguf.arch import ModelShape
from shimpy.registry.model import Model
from shimpy.server.services import Services

_MAX_NAMED = 12


class Need(msgspec.Struct, frozen=True):
    """What the model has to be able to do; `words` end the sentence "models that ..."."""

    words: str
    is_met: Callable[[ModelShape], bool]


ANYTHING = Need("can be used", lambda _: True)
GENERATING = Need("generate text", lambda shape: not (shape.is_embedding or shape.is_reranker))
INFILLING = Need("fill gaps", lambda shape: shape.has_fim and GENERATING.is_met(shape))
EMBEDDING = Need("embed text", lambda shape: not shape.is_reranker)
RANKING = Need("rank documents", lambda shape: shape.is_reranker)


async def choose_model(services: Services, given: str | None, need: Need) -> str:
    """Return the name of the model that is meant.

    1. The one that the request names.
    2. The only one that is loaded and meets the need.
    3. `default_model` of the config, where it meets the need.
    4. The only one that there is and that meets the need.

    Raises:
        InvalidOptionError: it could be several; the message lists them.
        NotFoundError: there is none that meets the need.
    """
    if given and given.strip():
        return given
    loaded = {
        resident.model.name: resident.model
        for resident in services.scheduler.residents()
        if resident.state != "stopping"
    }
    suitable = _suitable(loaded.values(), need)
    if len(suitable) == 1:
        return str(suitable[0].name)
    default = await _default(services, need)
    if default:
        return default
    known = _suitable(await services.registry.models(), need)
    if not suitable and len(known) == 1:
        return str(known[0].name)
    if not known:
        raise NotFoundError(f"there is no model here of those that {need.words}")
    which = "loaded models" if suitable else "models"
    name = services.config.default_model
    advice = f"correct default_model, which is {name!r}" if name else "set default_model"
    raise InvalidOptionError(
        f"model is required, as there are {len(suitable or known)} {which} that {need.words}: "
        f"{_listed(suitable or known)}; name one, load only one, or {advice}",
        option="model",
    )


async def _default(services: Services, need: Need) -> str:
    name = services.config.default_model
    if not name:
        return ""
    try:
        model = await services.registry.resolve(name)
    except (NotFoundError, RegistryError):
        return ""
    return str(model.name) if _suitable([model], need) else ""


def _suitable(models: Iterable[Model], need: Need) -> list[Model]:
    return [model for model in models if model.shape is not None and need.is_met(model.shape)]


def _listed(models: list[Model]) -> str:
    names = [str(model.name) for model in models]
    more = [f"and {len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return ", ".join(names[:_MAX_NAMED] + more)
