"""Which name each found model answers to, and which projector belongs to it. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from shimpy.names import ModelName, name_from_stem, name_part
from shimpy.registry.discovery import STORE, FoundModel

_PROJECTOR_MARK: Final = "mmproj"
# Of several projectors of one model: exact enough and small first.
_PROJECTOR_TAGS: Final = ("f16", "bf16", "q8_0", "f32", "latest")
# What a projector's name says of no model in particular.
_GENERIC_NAMES: Final = frozenset({"model", "ggml-model", "mmproj"})


def is_projector_name(path: Path) -> bool:
    """Whether a file is a projector by its name; what is in it decides, if it can be read."""
    return _PROJECTOR_MARK in path.stem.lower()


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A model with the name that it is listed under, and those that it answers to besides."""

    # Its place among the models that were to be named.
    index: int
    name: ModelName
    aliases: tuple[ModelName, ...] = ()


def assign_names(models: Sequence[FoundModel]) -> tuple[list[Named], list[str]]:
    """Return the models by name, and in words what had to be named otherwise than it asks.

    1. The first to have a name keeps it.
    2. One whose files came before is no model of its own, but a further name of the first;
       unless their settings differ, or somebody named them apart on purpose.
    3. One that comes after another of its name gets its tool's or its folders' names in front,
       as many as it takes, and at last a number.
    """
    naming = _Naming()
    for index, model in enumerate(models):
        naming.add(index, model)
    named = [
        Named(index=index, name=name, aliases=tuple(dict.fromkeys(aliases)))
        for index, (name, aliases) in naming.named.items()
    ]
    return named, naming.problems


class _Naming(msgspec.Struct):
    """Names given so far."""

    taken: dict[ModelName, FoundModel] = msgspec.field(default_factory=dict)
    # By the model's index: its name and aliases.
    named: dict[int, tuple[ModelName, list[ModelName]]] = msgspec.field(default_factory=dict)
    problems: list[str] = msgspec.field(default_factory=list)
    # By what tells files apart: the models that were named.
    _known: dict[object, list[tuple[int, FoundModel]]] = msgspec.field(default_factory=dict)

    def add(self, index: int, model: FoundModel) -> None:
        """Name one more model."""
        plain = model.name or name_from_stem(model.path.stem)
        twin = self._twin(model)
        if twin is not None:
            name, aliases = self.named[twin]
            aliases += [other for other in (plain, *model.aliases) if other != name]
            return
        first = self.taken.get(plain)
        name = plain
        if first is not None:
            name = next(n for n in _longer_names(plain, model) if n not in self.taken)
            self.problems.append(
                f"{model.path}: is named {name}, because {first.path} is named {plain}"
            )
        self.taken[name] = model
        self.named[index] = (name, [alias for alias in model.aliases if alias != name])
        for key in _keys(model):
            self._known.setdefault(key, []).append((index, model))

    def _twin(self, model: FoundModel) -> int | None:
        for key in _keys(model):
            for index, other in self._known.get(key, ()):
                if _is_twin(model, other):
                    return index
        return None


def _keys(model: FoundModel) -> list[object]:
    first = model.files[0]
    return [first.identity, first.digest] if first.digest else [first.identity]


def _is_twin(model: FoundModel, other: FoundModel) -> bool:
    """Whether a model is but another name of one that came before it."""
    if model.tool and model.tool == other.tool:
        return False
    # A name in the store for a file elsewhere was given to have both.
    if other.tool == STORE and model.files[0].identity == other.files[0].identity:
        return False
    return model.settings == other.settings and model.is_same_as(other)


def pick_projector(
    model: Path, projectors: Iterable[Path], *, n_names_in_folder: int
) -> Path | None:
    """Return the projector for a model out of those in its folder; None: none belongs to it.

    One that carries the model's name comes first; in a folder of one model's files any does.
    """
    name = name_from_stem(model.stem).name
    ranked = []
    for path in projectors:
        subject = _subject(path)
        is_namesake = bool(subject) and (name.startswith(subject) or subject.startswith(name))
        if is_namesake or n_names_in_folder == 1:
            overlap = min(len(subject), len(name)) if is_namesake else 0
            ranked.append((-overlap, _tag_rank(path), path.name, path))
    return min(ranked)[-1] if ranked else None


def _longer_names(plain: ModelName, model: FoundModel) -> Iterator[ModelName]:
    name = plain.name
    if model.tool:
        yield ModelName(f"{name_part(model.tool)}/{name}", plain.tag)
    for parent in model.path.parents if model.name is None else ():
        if parent.name:
            name = f"{name_part(parent.name)}/{name}"
            yield ModelName(name, plain.tag)
    for number in itertools.count(2):
        yield ModelName(f"{plain.name}-{number}", plain.tag)


def _subject(projector: Path) -> str:
    """Return the model's name within a projector's; "": it names none."""
    named = name_from_stem(projector.stem).name
    parts = [part.strip("._-") for part in named.split(_PROJECTOR_MARK)]
    subject = max(parts, key=len)
    return "" if subject in _GENERIC_NAMES else subject


def _tag_rank(projector: Path) -> int:
    tag = name_from_stem(projector.stem).tag
    return _PROJECTOR_TAGS.index(tag) if tag in _PROJECTOR_TAGS else len(_PROJECTOR_TAGS)
