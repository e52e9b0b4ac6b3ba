"""The catalog: models by short names, and what is worth knowing to run them.

It is data: registry.toml, which comes with shimpy, and beneath it whatever the user's own
registry.toml in the config folder says; a table there changes the keys that it gives and leaves
the rest of the entry as it was. The files of a model are found in its repository's listing, by
their quantization; no file's name is written here.

    [models."name"]
    title = "..."                what it is, for people
    license = "..."              "apache-2.0"
    repo = "org/name"            one repository for all quantizations, or
    tags = { q4_k_m = "org/name", ... }   one for each
    files = "*-Instruct-*"       only these, where a repository holds several models
    options = { temperature = 0.7 }       Ollama's names
    stop = ["..."]
    template = "..."             in place of the file's own
    raw = true                   a lone prompt goes to it as it is; conversations by the template
    system = "..."
    notes = "..."
    aliases = ["qwen3:8b"]       further names, with or without a tag
    checked = false              whether `shimpy catalog check` has found it on the real hub
    unavailable = "..."          why there is nothing to pull
    builtin = true               it comes with shimpy
"""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import tomli

from shimpy.errors import InvalidNameError, NotFoundError, RegistryError, UnsupportedError
from shimpy.names import DEFAULT_TAG, ModelName, name_from_stem, parse_model_name
from shimpy.registry.settings import NO_SETTINGS, ModelSettings

FILE_NAME: Final = "registry.toml"
OptionValue = bool | int | float | str | list[str]
# Of these an entry has one; a user's entry that gives one takes the place of the other.
_PLACES: Final = ("repo", "tags", "unavailable", "builtin")
_REPOSITORY_PARTS: Final = 2


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the catalog says of one model; see the module's text."""

    title: str
    license: str = ""
    repo: str | None = None
    tags: Mapping[str, str] = {}
    files: str | None = None
    options: Mapping[str, OptionValue] = {}
    stop: tuple[str, ...] = ()
    template: str | None = None
    raw: bool | None = None
    system: str | None = None
    notes: str = ""
    aliases: tuple[str, ...] = ()
    checked: bool = False
    unavailable: str = ""
    builtin: bool = False

    @property
    def settings(self) -> ModelSettings:
        """What holds for the model unless it or the user says otherwise."""
        stop = {"stop": list(self.stop)} if self.stop else {}
        return ModelSettings(
            parameters={**self.options, **stop},
            template=self.template,
            raw=self.raw,
            system=self.system,
            notes=self.notes or None,
        )

    def repositories(self) -> list[str]:
        """Return all repositories that it is found in."""
        return list(dict.fromkeys([self.repo] if self.repo else self.tags.values()))


class CatalogMatch(msgspec.Struct, frozen=True, kw_only=True):
    """What a name means in the catalog."""

    # The entry's own name.
    name: str
    entry: Entry
    # The quantization that was asked for; None: any.
    quantization: str | None


class Catalog:
    """Entries by name; immutable."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(sorted(entries.items()))
        self._aliases = {
            parse_model_name(alias): name
            for name, entry in self.entries.items()
            for alias in entry.aliases
        }

    def resolve(self, wanted: ModelName) -> CatalogMatch:
        """Return the entry that a name means.

        1. An alias, tag and all: "qwen3:8b"; one behind whose tag a quantization stands:
           "qwen3:8b-q8_0".
        2. An entry's name; its tag is the quantization.

        Raises:
            NotFoundError: there is no such entry; names what is near.
            UnsupportedError: there is, and it says why there is nothing to pull.
        """
        match = self._find(wanted)
        if match is None:
            raise NotFoundError(self._explain_missing(wanted))
        if match.entry.unavailable:
            raise UnsupportedError(f"{match.name} can't be pulled: {match.entry.unavailable}")
        return match

    def settings(self, name: ModelName) -> ModelSettings:
        """Return the defaults of a model that has an entry's name, whatever its tag."""
        entry = self.entries.get(name.name)
        return NO_SETTINGS if entry is None else entry.settings

    def knows(self, wanted: ModelName) -> bool:
        """Whether there is an entry of that name, be it one that can't be pulled."""
        return self._find(wanted) is not None

    def has(self, wanted: ModelName) -> bool:
        """Whether there is an entry of that name that can be pulled."""
        match = self._find(wanted)
        return match is not None and not match.entry.unavailable and not match.entry.builtin

    def _find(self, wanted: ModelName) -> CatalogMatch | None:
        if wanted in self._aliases:
            name = self._aliases[wanted]
            return CatalogMatch(name=name, entry=self.entries[name], quantization=None)
        if wanted.name in self.entries:
            tag = None if wanted.tag == DEFAULT_TAG else wanted.tag
            entry = self.entries[wanted.name]
            return CatalogMatch(name=wanted.name, entry=entry, quantization=tag)
        # The longest first: "qwen3:30b-a3b" before "qwen3:30b".
        for alias in sorted(self._aliases, key=lambda alias: -len(alias.tag)):
            head = "" if alias.tag == DEFAULT_TAG else f"{alias.tag}-"
            tag = wanted.tag.removeprefix(head)
            if alias.name == wanted.name and f"{head}{tag}" == wanted.tag and _is_quantization(tag):
                name = self._aliases[alias]
                return CatalogMatch(name=name, entry=self.entries[name], quantization=tag)
        return None

    def _explain_missing(self, wanted: ModelName) -> str:
        names = [*self.entries, *(alias.name for alias in self._aliases)]
        near = difflib.get_close_matches(wanted.name, dict.fromkeys(names), n=3)
        tagged = [
            str(alias).removesuffix(f":{DEFAULT_TAG}")
            for alias in self._aliases
            if alias.name == wanted.name
        ]
        near = tagged or near
        meant = f"; did you mean {' or '.join(near)}?" if near else "."
        shown = wanted.name if wanted.tag == DEFAULT_TAG else str(wanted)
        return (
            f'the catalog has no "{shown}"{meant} `shimpy catalog` lists what it has; any '
            "other model can be pulled by its place: hf.co/org/repo:Q4_K_M, ollama:name:tag or "
            "https://.../file.gguf"
        )


class CatalogFile:
    """The catalog as its files are now; they are read again when the user's has changed."""

    def __init__(self, user_file: Path | None = None) -> None:
        """Read the files; errors as `load_catalog`."""
        self._user_file = user_file
        self._stamp = _stamp(user_file)
        self._catalog = load_catalog(user_file)

    def current(self) -> Catalog:
        """Return the catalog; blocking. Errors as `load_catalog`."""
        stamp = _stamp(self._user_file)
        if stamp != self._stamp:
            self._catalog = load_catalog(self._user_file)
            self._stamp = stamp
        return self._catalog

    def settings(self, name: ModelName) -> ModelSettings:
        """Return the defaults of a model, by what was read last."""
        return self._catalog.settings(name)


def _stamp(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size) if status is not None else None


def _is_quantization(tag: str) -> bool:
    return name_from_stem(f"x-{tag}") == ModelName("x", tag)


def load_catalog(user_file: Path | None = None) -> Catalog:
    """Return the catalog that comes with shimpy, with the user's file over it; blocking.

    Raises:
        RegistryError: a file can't be read, or an entry is wrong; names file, entry and key.
    """
    packaged = importlib.resources.files("shimpy").joinpath(FILE_NAME)
    if not packaged.is_file():
        # In a source tree it lies where people look for it.
        packaged = Path(__file__).parents[2] / FILE_NAME
    tables = _parse(packaged.read_bytes(), FILE_NAME)
    entries = dict(_entries(tables, FILE_NAME))
    if user_file is not None and user_file.is_file():
        try:
            own = _parse(user_file.read_bytes(), str(user_file))
        except OSError as error:
            raise RegistryError(f"{user_file}: can't be read: {error.strerror}") from error
        merged = {name: _merged(tables.get(name), table) for name, table in own.items()}
        entries |= _entries(merged, str(user_file))
    return Catalog(entries)


def _parse(data: bytes, source: str) -> dict[str, Any]:
    try:
        document = tomli.loads(data.decode())
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"{source} is not valid TOML: {error}") from error
    unknown = sorted(document.keys() - {"models"})
    if unknown:
        raise RegistryError(
            f"{source}: there is no such key: {', '.join(unknown)}; entries are written as "
            '[models."name"]'
        )
    models = document.get("models", {})
    if not isinstance(models, dict):
        raise RegistryError(f"{source}: models must be a table of entries")
    return models


def _merged(base: Any, own: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    kept = base if not own.keys() & set(_PLACES) else _less(base, _PLACES)
    return {**kept, **own}


def _less(table: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _entries(tables: Mapping[str, Any], source: str) -> Iterator[tuple[str, Entry]]:
    for name, table in tables.items():
        where = f'{source}: [models."{name}"]'
        try:
            entry = msgspec.convert(table, Entry)
        except msgspec.ValidationError as error:
            raise RegistryError(f"{where}: {error}") from error
        _check(name, entry, where)
        yield name, entry


def _check(name: str, entry: Entry, where: str) -> None:
    """Raise RegistryError for what the types can't say."""
    places = [key for key in _PLACES if getattr(entry, key)]
    if len(places) != 1:
        given = " and ".join(places) or "none"
        raise RegistryError(f"{where}: it must have one of {', '.join(_PLACES)}, not {given}")
    for repository in entry.repositories():
        if repository.count("/") != _REPOSITORY_PARTS - 1:
            raise RegistryError(f'{where}: "{repository}" is no repository; write org/name')
    try:
        names = [parse_model_name(text) for text in (name, *entry.aliases)]
        names += [parse_model_name(f"x:{tag}") for tag in entry.tags]
    except InvalidNameError as error:
        raise RegistryError(f"{where}: {error.message}") from error
    if names[0].name != name:
        raise RegistryError(f"{where}: an entry's name is in lower case and has no tag")
    if any(tag != tag.lower() for tag in entry.tags):
        raise RegistryError(f"{where}: tags are in lower case")
