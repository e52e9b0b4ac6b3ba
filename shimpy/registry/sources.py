"""Where the models come from that a reference can mean, brought into one form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final, assert_never
from urllib.parse import urlsplit

import msgspec

from shimpy.errors import NotFoundError, UserError
from shimpy.names import DEFAULT_TAG, ModelName, name_from_stem, name_part, parse_model_name
from shimpy.registry import ollama_hub
from shimpy.registry.catalog import Catalog, CatalogMatch
from shimpy.registry.manifest import Origin
from shimpy.registry.offers import Offer, canonical, find_offer, find_path, list_offers, one_of_each
from shimpy.registry.reference import (
    HUB,
    OLLAMA,
    OLLAMA_HOST,
    OLLAMA_NAMESPACE,
    CatalogReference,
    HubReference,
    OllamaReference,
    Reference,
    UrlReference,
)
from shimpy.registry.settings import NO_SETTINGS, ModelSettings
from shimpy.registry.web import Web

if TYPE_CHECKING:
    # Its client takes as long to import as half of the daemon: where it is used, below.
    from shimpy.registry import hub

_USUAL_HUB: Final = "https://huggingface.co"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that could be pulled."""

    name: ModelName
    offer: Offer
    origin: Origin
    # What it comes with.
    settings: ModelSettings = NO_SETTINGS


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What a reference means: one model, or one in several quantizations."""

    candidates: tuple[Candidate, ...]
    # Further names for whichever is taken.
    aliases: tuple[ModelName, ...] = ()


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Finds what references mean; blocking, over the network."""

    catalog: Callable[[], Catalog]
    web: Web = msgspec.field(default_factory=Web)

    def find(self, reference: Reference) -> Source:
        """Return what a reference means.

        Raises:
            NotFoundError: there is no such model; says what there is instead.
            TransientError: the line broke, or a server is busy.
            ShimpyError: a server refuses; says why.
        """
        match reference:
            case CatalogReference():
                return self._find_in_catalog(reference)
            case HubReference():
                return _find_on_hub(reference)
            case OllamaReference():
                return self._find_in_ollama(reference)
            case UrlReference():
                return self._find_at_url(reference)
            case _:
                assert_never(reference)

    def _find_in_catalog(self, reference: CatalogReference) -> Source:
        match = self.catalog().resolve(reference.name)
        if match.entry.builtin:
            raise UserError(f'"{match.name}" comes with shimpy; there is nothing to pull')
        candidates: list[Candidate] = []
        missing: list[NotFoundError] = []
        for tag, place in _places(match):
            try:
                candidates += _find_in_entry(match, tag, place)
            except NotFoundError as error:
                missing.append(error)
        if not candidates:
            raise missing[0]
        aliases = [reference.name]
        if match.quantization is None:
            aliases += [parse_model_name(text) for text in (match.name, *match.entry.aliases)]
        return Source(candidates=tuple(candidates), aliases=tuple(dict.fromkeys(aliases)))

    def _find_in_ollama(self, reference: OllamaReference) -> Source:
        model = ollama_hub.fetch_model(self.web, reference)
        short = [reference.name]
        if reference.namespace != OLLAMA_NAMESPACE:
            short.insert(0, reference.namespace)
        host = [name_part(reference.host)] if reference.host != OLLAMA_HOST else []
        plain = ModelName("/".join(map(name_part, short)), name_part(reference.tag))
        name = ModelName("/".join([OLLAMA, *host, plain.name]), plain.tag)
        offer = Offer(
            quantization=plain.tag,
            path=model.files[0].path,
            files=model.files,
            projector=model.projector,
        )
        endpoint = f"{'http' if reference.is_insecure else 'https'}://{reference.host}"
        origin = Origin(
            kind="ollama",
            location=f"{reference.namespace}/{reference.name}:{reference.tag}",
            endpoint="" if reference.host == OLLAMA_HOST else endpoint,
        )
        found = Candidate(name=name, offer=offer, origin=origin, settings=model.settings)
        return Source(candidates=(found,), aliases=(plain,))

    def _find_at_url(self, reference: UrlReference) -> Source:
        file = self.web.describe(reference)
        stem = PurePosixPath(reference.file_name).stem
        plain = name_from_stem(stem)
        host = name_part(urlsplit(reference.url).hostname or "")
        found = Candidate(
            name=ModelName(f"{host}/{plain.name}", plain.tag),
            offer=Offer(quantization=plain.tag, path=file.path, files=(file,)),
            origin=Origin(kind="url", location=reference.url),
        )
        return Source(candidates=(found,), aliases=(plain,))


def _places(match: CatalogMatch) -> list[tuple[str | None, str]]:
    """Return the quantizations that are meant, None for all, and the repository of each."""
    wanted = None if match.quantization is None else canonical(match.quantization)
    if match.entry.repo is not None:
        return [(wanted, match.entry.repo)]
    places = [(tag, repo) for tag, repo in match.entry.tags.items() if wanted in {None, tag}]
    if not places:
        have = ", ".join(match.entry.tags)
        raise NotFoundError(f"the catalog has no {wanted} of {match.name}; it has {have}")
    return list(places)


def _find_in_entry(match: CatalogMatch, tag: str | None, place: str) -> list[Candidate]:
    from shimpy.registry import hub

    repository = hub.fetch_repository(place)
    offers = list_offers(repository.files, pattern=match.entry.files)
    if not offers:
        raise NotFoundError(f"{place} holds no GGUF model")
    if tag is None:
        chosen = one_of_each(offers, where=place)
    else:
        chosen = [find_offer(offers, tag, where=place)]
    return [
        Candidate(
            name=ModelName(match.name, offer.quantization),
            offer=offer,
            origin=_hub_origin(repository),
            settings=ModelSettings(license=match.entry.license or repository.license or None),
        )
        for offer in chosen
    ]


def _find_on_hub(reference: HubReference) -> Source:
    from shimpy.registry import hub

    where = reference.repository
    repository = hub.fetch_repository(where, revision=reference.revision)
    offers = list_offers(repository.files)
    if reference.path is not None:
        chosen = [find_path(offers, reference.path, where=where)]
    elif reference.quantization is not None:
        chosen = [find_offer(offers, reference.quantization, where=where)]
    elif offers:
        chosen = one_of_each(offers, where=where)
    else:
        raise NotFoundError(f"{where} holds no GGUF model")
    address = "/".join([HUB, *map(name_part, repository.name.split("/"))])
    candidates = [
        Candidate(
            name=_hub_name(address, offer, offers, where),
            offer=offer,
            origin=_hub_origin(repository),
            settings=ModelSettings(license=repository.license or None),
        )
        for offer in chosen
    ]
    is_open = reference.quantization is None and reference.path is None
    return Source(
        candidates=tuple(candidates), aliases=(ModelName(address, DEFAULT_TAG),) if is_open else ()
    )


def _hub_name(address: str, offer: Offer, offers: list[Offer], where: str) -> ModelName:
    """Return a model's name: by its repository, and by its file where that does not tell it."""
    try:
        is_told = find_offer(offers, offer.quantization, where=where) == offer
    except NotFoundError:
        is_told = False
    if is_told:
        return ModelName(address, offer.quantization)
    plain = name_from_stem(PurePosixPath(offer.path).stem)
    return ModelName(f"{address}/{plain.name}", plain.tag)


def _hub_origin(repository: hub.Repository) -> Origin:
    from shimpy.registry import hub

    endpoint = hub.endpoint()
    return Origin(
        kind="huggingface",
        location=repository.name,
        revision=repository.commit,
        endpoint="" if endpoint == _USUAL_HUB else endpoint,
    )
