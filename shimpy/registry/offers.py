"""Which models a repository offers, by its listing alone: quantizations, shards, projectors. Pure.

File names say what a file is; nothing is opened. A model in shards is one offer, and one that
lacks a shard is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from shimpy.errors import NotFoundError
from shimpy.gguf.reader import MAX_SHARDS
from shimpy.names import DEFAULT_TAG, name_from_stem, name_part, parse_shard
from shimpy.registry.naming import is_projector_name, pick_projector
from shimpy.registry.remote import RemoteFile

_SUFFIX: Final = ".gguf"
# Importance matrices, vocabularies, drafts and adapters are GGUF files too.
_NO_MODELS: Final = re.compile(r"(?:^|[-._])(?:imatrix|lora|vocab|control[-_]vector)(?:[-._]|$)")
_MOST_NAMED: Final = 8


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a repository holds."""

    # As a tag, "q4_k_m"; `latest` where the file's name says none.
    quantization: str
    # The path of its file, of the first where there are several.
    path: str
    # All shards in order.
    files: tuple[RemoteFile, ...]
    # An mmproj file that belongs to it.
    projector: RemoteFile | None = None

    @property
    def size_bytes(self) -> int:
        """What the model takes, its projector left out."""
        return sum(file.size_bytes or 0 for file in self.files)

    @property
    def all_files(self) -> tuple[RemoteFile, ...]:
        """The model's files and its projector's."""
        return self.files if self.projector is None else (*self.files, self.projector)


def list_offers(files: Sequence[RemoteFile], *, pattern: str | None = None) -> list[Offer]:
    """Return the whole models among a repository's files, sorted by path.

    Args:
        files: its listing.
        pattern: only files whose path or name it matches (as in a shell) count as models.
    """
    ggufs = [file for file in files if file.path.lower().endswith(_SUFFIX)]
    projectors = {Path(file.path): file for file in ggufs if is_projector_name(Path(file.path))}
    groups: dict[tuple[str, int], dict[int, RemoteFile]] = {}
    for file in ggufs:
        if Path(file.path) in projectors or _is_no_model(file) or not _matches(file, pattern):
            continue
        base, index, count = _shard(file)
        groups.setdefault((base, count), {})[index] = file
    names = {_model_name(base) for base, _ in groups}
    offers = []
    for (base, count), shards in sorted(groups.items()):
        if sorted(shards) == list(range(1, count + 1)):
            # One for all: repositories keep it beside the models or in the folder above.
            path = pick_projector(
                Path(f"{base}{_SUFFIX}"), projectors, n_names_in_folder=len(names)
            )
            offers.append(
                Offer(
                    quantization=_quantization(base),
                    path=shards[1].path,
                    files=tuple(shards[index] for index in sorted(shards)),
                    projector=None if path is None else projectors[path],
                )
            )
    return offers


def find_offer(offers: Sequence[Offer], quantization: str, *, where: str) -> Offer:
    """Return the model of one quantization; of several the one that is nearest to `where`.

    Raises:
        NotFoundError: there is none, or there are several different ones; names those there are.
    """
    wanted = canonical(quantization)
    found = [offer for offer in offers if offer.quantization == wanted]
    if not found:
        have = ", ".join(dict.fromkeys(offer.quantization for offer in offers))
        raise NotFoundError(f"{where} has no {quantization}; it has {have or 'no GGUF model'}")
    return _nearest(found, where)


def find_path(offers: Sequence[Offer], path: str, *, where: str) -> Offer:
    """Return the model that a file belongs to.

    Raises:
        NotFoundError: there is no such file, or it is no model's.
    """
    for offer in offers:
        if any(file.path == path for file in offer.files):
            return offer
    names = [offer.path for offer in offers]
    shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
    raise NotFoundError(f"{where} has no model {path}; it has {shown or 'no GGUF model'}")


def one_of_each(offers: Sequence[Offer], *, where: str) -> list[Offer]:
    """Return for each quantization its model, as `find_offer` would."""
    by_tag = dict.fromkeys(offer.quantization for offer in offers)
    return [find_offer(offers, tag, where=where) for tag in by_tag]


def canonical(quantization: str) -> str:
    """Return a quantization as tags write it: "Q4_K_M" is q4_k_m, "fp16" is f16."""
    tag = name_from_stem(f"x-{quantization}").tag
    return quantization.lower() if tag == DEFAULT_TAG else tag


def _nearest(offers: list[Offer], where: str) -> Offer:
    """Return the offer that a repository's name is about, where they are of several models."""
    title = name_part(where.rpartition("/")[2])
    is_named = {offer.path: title.startswith(_model_name(_base(offer))) for offer in offers}
    ranked = sorted(
        offers,
        key=lambda o: (not is_named[o.path], len(o.files), o.path.count("/"), o.path),
    )
    names = {_model_name(_base(offer)) for offer in offers}
    if len(names) > 1 and not is_named[ranked[0].path]:
        paths = ", ".join(offer.path for offer in offers[:_MOST_NAMED])
        raise NotFoundError(
            f"{where} has {len(offers)} different models of {offers[0].quantization}; ask for one "
            f"of them by its file: {paths}"
        )
    return ranked[0]


def _quantization(base: str) -> str:
    """Return the quantization in a file's name, else in its folder's."""
    path = PurePosixPath(base)
    # A file or folder may also be called by it alone: "Q4_K_M/model.gguf".
    texts = (path.name, f"x-{path.name}", f"x-{path.parent.name}")
    tags = (name_from_stem(text).tag for text in texts)
    return next((tag for tag in tags if tag != DEFAULT_TAG), DEFAULT_TAG)


def _model_name(base: str) -> str:
    return name_from_stem(PurePosixPath(base).name).name


def _base(offer: Offer) -> str:
    return _shard(offer.files[0])[0]


def _shard(file: RemoteFile) -> tuple[str, int, int]:
    """Return a file's path without suffix and shard, its number, and of how many."""
    path = PurePosixPath(file.path)
    shard = parse_shard(path.stem)
    if shard is None or not 1 <= shard[1] <= shard[2] <= MAX_SHARDS:
        return str(path.with_name(path.stem)), 1, 1
    return str(path.with_name(shard[0])), shard[1], shard[2]


def _is_no_model(file: RemoteFile) -> bool:
    return _NO_MODELS.search(file.name.lower()) is not None


def _matches(file: RemoteFile, pattern: str | None) -> bool:
    return pattern is None or any(fnmatchcase(text, pattern) for text in (file.path, file.name))
