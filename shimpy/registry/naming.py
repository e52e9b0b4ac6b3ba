"""Which name each found model answers to, and which projector belongs to it. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from shimpy.names import ModelName, name_from_stem, name_part
from shimpy.registry.discovery import FoundModel

_PROJECTOR_MARK: Final = "mmproj"
# Of several projectors of one model: exact enough and small first.
_PROJECTOR_TAGS: Final = ("f16", "bf16", "q8_0", "f32", "latest")
# What a projector's name says of no model in particular.
_GENERIC_NAMES: Final = frozenset({"model", "ggml-model", "mmproj"})


def is_projector_name(path: Path) -> bool:
    """Whether a file is a projector by its name; what is in it decides, if it can be read."""
    return _PROJECTOR_MARK in path.stem.lower()


def assign_names(models: Sequence[FoundModel]) -> tuple[list[ModelName | None], list[str]]:
    """Return each model's name, and in words what had to be named otherwise than its file.

    The first to have a name keeps it. One that comes after it gets its folders' names in
    front, as many as it takes, and at last a number. None: it is the same file as the one
    that has the name.
    """
    taken: dict[ModelName, FoundModel] = {}
    names: list[ModelName | None] = []
    problems: list[str] = []
    for model in models:
        plain = name_from_stem(model.path.stem)
        first = taken.setdefault(plain, model)
        if first is model:
            names.append(plain)
        elif first.files[0].identity == model.files[0].identity:
            names.append(None)
        else:
            name = next(n for n in _longer_names(plain, model.path) if n not in taken)
            taken[name] = model
            names.append(name)
            problems.append(f"{model.path}: is named {name}, because {first.path} is named {plain}")
    return names, problems


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


def _longer_names(plain: ModelName, path: Path) -> Iterator[ModelName]:
    name = plain.name
    for parent in path.parents:
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
