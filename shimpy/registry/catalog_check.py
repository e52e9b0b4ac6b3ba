"""Whether the catalog's entries are what the hub really has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import msgspec

from shimpy.errors import ShimpyError
from shimpy.registry import hub
from shimpy.registry.attempts import Retries, Stop
from shimpy.registry.catalog import Entry
from shimpy.registry.offers import find_offer, list_offers, one_of_each


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of an entry."""

    name: str
    # The quantizations that can be pulled.
    tags: tuple[str, ...] = ()
    # What is wrong with it, in words; empty: nothing.
    problems: tuple[str, ...] = ()


def check_entries(
    entries: Mapping[str, Entry], retries: Retries | None = None
) -> Iterator[Checked]:
    """Yield what the hub has of each entry that has a place there; blocking."""
    for name, entry in entries.items():
        if entry.repositories():
            yield _check(name, entry, retries or Retries(most=3))


def _check(name: str, entry: Entry, retries: Retries) -> Checked:
    tags: list[str] = []
    problems: list[str] = []
    places = [(None, entry.repo)] if entry.repo else list(entry.tags.items())
    for tag, place in places:
        try:
            repository = retries.run(partial(hub.fetch_repository, place), Stop())
            offers = list_offers(repository.files, pattern=entry.files)
            if tag is None:
                found = one_of_each(offers, where=place)
            else:
                found = [find_offer(offers, tag, where=place)]
        except ShimpyError as error:
            problems.append(error.message)
            continue
        if not found:
            problems.append(f"{place} holds no GGUF model")
        tags += [offer.quantization for offer in found]
    return Checked(name=name, tags=tuple(tags), problems=tuple(problems))
