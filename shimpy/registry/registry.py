"""The models of this machine by name, from all sources: scanned, read once, resolved."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from shimpy.errors import GgufError, InvalidNameError, NotFoundError
from shimpy.gguf.arch import NotAModelError, describe_model
from shimpy.gguf.header import Header
from shimpy.gguf.reader import read_files, read_header
from shimpy.names import DEFAULT_TAG, ModelName, name_from_stem, parse_model_name
from shimpy.registry.discovery import Folders, FoundModel, Scan, Source
from shimpy.registry.index import HeaderIndex, Kind, Record, decode
from shimpy.registry.model import Model
from shimpy.registry.mounts import are_local
from shimpy.registry.naming import Named, assign_names, is_projector_name, pick_projector
from shimpy.registry.settings import NO_SETTINGS, ModelSettings

# Behind a network, reading headers waits more than it computes.
_N_READERS: Final = 4
# What the kernel is asked to have ready of each file: the headers of small vocabularies.
_AHEAD_BYTES: Final = 1024 * 1024
# Where a name came from changes nothing about which model it is.
_HOST_ALIASES: Final = {"huggingface.co/": "hf.co/"}

SettingsOf = Callable[[ModelName], ModelSettings]


def no_settings(_name: ModelName) -> ModelSettings:
    """Return that nothing is set."""
    return NO_SETTINGS


class _Snapshot(msgspec.Struct, frozen=True):
    """What a scan came to; replaced as a whole."""

    models: tuple[Model, ...] = ()
    problems: tuple[str, ...] = ()
    by_name: Mapping[ModelName, Model] = msgspec.field(default_factory=dict)
    by_alias: Mapping[ModelName, Model] = msgspec.field(default_factory=dict)


class Registry:
    """The models in some folders, and in other sources.

    `refresh` blocks and is meant for a worker thread; scans that overlap wait for each other.
    The other methods answer from the last scan, from any thread, without touching the disk.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        index_path: Path,
        before: Sequence[Source] = (),
        after: Sequence[Source] = (),
        settings: SettingsOf = no_settings,
        defaults: SettingsOf = no_settings,
    ) -> None:
        """Know models from several sources; of two with one name, the first keeps it.

        Args:
            folders: of GGUF files.
            index_path: where headers are remembered.
            before: sources whose names go before those of the folders' files.
            after: sources that come after them.
            settings: what the user set about a model, by its name.
            defaults: what holds for a model where neither it nor the user says otherwise.
        """
        self._folders = tuple(folders)
        self._before, self._after = tuple(before), tuple(after)
        self._sources = self._all_sources()
        self._settings, self._defaults = settings, defaults
        self._index = HeaderIndex(index_path)
        self._lock = threading.Lock()
        # By the path of a model's first file: the stamp of its files and what they said.
        self._known: dict[str, tuple[str, Record]] = {}
        # The same from before the restart, not decoded until a file asks for it.
        self._stored: dict[str, tuple[str, bytes]] | None = None
        # Paths that are in the index, and records that are still to be written there.
        self._indexed: set[str] = set()
        self._unsaved: dict[str, tuple[str, Record]] = {}
        self._snapshot = _Snapshot()

    def use_folders(self, folders: Sequence[Path]) -> None:
        """Search other folders from the next scan on; waits for one that runs."""
        with self._lock:
            self._folders = tuple(folders)
            self._sources = self._all_sources()

    def refresh(self) -> None:
        """Look at all sources again and read the headers of files that are new or changed."""
        with self._lock:
            scan = _merge([source.scan() for source in self._sources])
            records = self._look_up(scan)
            snapshot = self._build_snapshot(scan, records)
            if self._index.problem is not None:
                problems = (*snapshot.problems, self._index.problem)
                snapshot = replace(snapshot, problems=problems)
            self._snapshot = snapshot

    def models(self) -> tuple[Model, ...]:
        """Return all models as of the last scan, the broken ones too, sorted by name."""
        return self._snapshot.models

    @property
    def problems(self) -> tuple[str, ...]:
        """What kept the last scan from seeing or naming all there is, in words."""
        return self._snapshot.problems

    def resolve(self, text: str) -> Model:
        """Return the model that `text` ("name" or "name:tag") means, as of the last scan.

        1. The name and tag as they stand: a model's own, else an alias.
        2. Without a tag, or with `latest`, the only model of that name that is not broken; its
           own, else an alias.

        Paths are no names: what is in no folder is out of reach.

        Raises:
            InvalidNameError: `text` is no name.
            NotFoundError: there is no such model; the message names what is near.
            GgufError: there is, but its file is broken.
        """
        wanted = _parse_wanted(text)
        snapshot = self._snapshot
        exact = snapshot.by_name.get(wanted) or snapshot.by_alias.get(wanted)
        if exact is not None:
            return _usable(exact)
        namesakes: dict[ModelName, Model] = {}
        for names in (snapshot.by_name, snapshot.by_alias):
            namesakes = {name: m for name, m in names.items() if name.name == wanted.name}
            if namesakes:
                break
        if wanted.tag == DEFAULT_TAG:
            whole = {m.name: m for m in namesakes.values() if m.error is None}
            whole = whole or {m.name: m for m in namesakes.values()}
            if len(whole) == 1:
                return _usable(*whole.values())
        raise NotFoundError(self._explain_missing(wanted, sorted(namesakes)))

    def _explain_missing(self, wanted: ModelName, namesakes: list[ModelName]) -> str:
        tags = ", ".join(map(str, namesakes))
        if namesakes and wanted.tag == DEFAULT_TAG:
            return f'"{wanted.name}" means {len(namesakes)} models; ask for one of them: {tags}'
        if namesakes:
            return f'there is no model "{wanted}"; of that name there is {tags}'
        names = sorted({model.name.name for model in self.models()})
        near = difflib.get_close_matches(wanted.name, names, n=3)
        near += [name for name in names if wanted.name in name and name not in near][:3]
        if near:
            return f'there is no model "{wanted}"; did you mean {" or ".join(near[:3])}?'
        folders = ", ".join(map(str, self._folders)) or "none is set: see --model-dirs"
        return f'there is no model "{wanted}" (searched folders: {folders})'

    def _all_sources(self) -> tuple[Source, ...]:
        return (*self._before, Folders(self._folders), *self._after)

    def _look_up(self, scan: Scan) -> list[Record]:
        """Return what is known of each found model, reading only what is new or changed."""
        if self._stored is None:
            self._stored = self._index.load()
            self._indexed = set(self._stored)
        records = [self._recall(model) for model in scan.models]
        unread = [m for m, record in zip(scan.models, records, strict=True) if record is None]
        read = dict(zip(map(_key, unread), _read_all(unread), strict=True))
        looked_up = [
            record or read[_key(model)] for model, record in zip(scan.models, records, strict=True)
        ]
        self._known = {
            _key(model): (model.stamp, record)
            for model, record in zip(scan.models, looked_up, strict=True)
            if record.is_lasting
        }
        self._stored = {}
        self._save({key: self._known[key] for key in read if key in self._known}, scan)
        return looked_up

    def _recall(self, model: FoundModel) -> Record | None:
        """Return the record of a model whose files are as they were; None: read them."""
        if model.problem is not None:
            return None
        stamp, record = self._known.get(_key(model), ("", None))
        if stamp == model.stamp:
            return record
        stored_stamp, data = (self._stored or {}).get(_key(model), ("", b""))
        return decode(data) if stored_stamp == model.stamp else None

    def _save(self, changed: dict[str, tuple[str, Record]], scan: Scan) -> None:
        """Bring the index up to date; what can't be written now is tried again next time."""
        found = {_key(model) for model in scan.models}
        gone = {key for key in self._indexed - found if _is_below(Path(key), scan.readable)}
        self._unsaved = {key: entry for key, entry in self._unsaved.items() if key in found}
        self._unsaved |= changed
        if self._index.store(self._unsaved, gone):
            self._indexed = (self._indexed - gone) | self._unsaved.keys()
            self._unsaved = {}

    def _build_snapshot(self, scan: Scan, records: Sequence[Record]) -> _Snapshot:
        """Return the models by name, each with its projector and its settings."""
        found, parts = _sort_out(scan, records)
        named, renamed = assign_names([model for model, _ in found])
        models = []
        for entry in named:
            one, record = found[entry.index]
            layers = self._settings(entry.name).over(one.settings)
            settings = layers.over(self._defaults(entry.name))
            projector = one.projector or parts.projector_of(one)
            models.append(_make_model(entry, one, record, projector, settings))
        models.sort(key=lambda model: model.name)
        by_name = {model.name: model for model in models}
        by_alias: dict[ModelName, Model] = {}
        for model in models:
            for alias in model.aliases:
                if alias not in by_name:
                    by_alias.setdefault(alias, model)
        return _Snapshot(
            models=tuple(models),
            problems=(*scan.problems, *parts.broken, *renamed),
            by_name=by_name,
            by_alias=by_alias,
        )


def _merge(scans: Iterable[Scan]) -> Scan:
    scans = list(scans)
    return Scan(
        models=tuple(model for scan in scans for model in scan.models),
        readable=tuple(path for scan in scans for path in scan.readable),
        problems=tuple(problem for scan in scans for problem in scan.problems),
    )


def _parse_wanted(text: str) -> ModelName:
    wanted = parse_model_name(text)
    for host, ours in _HOST_ALIASES.items():
        if wanted.name.startswith(host):
            return ModelName(ours + wanted.name.removeprefix(host), wanted.tag)
    return wanted


def _key(model: FoundModel) -> str:
    return str(model.path)


def _is_below(path: Path, folders: Iterable[Path]) -> bool:
    return any(folder == path or folder in path.parents for folder in folders)


def _usable(model: Model) -> Model:
    if model.error is not None:
        raise GgufError(model.error)
    return model


def _read_all(found: Sequence[FoundModel]) -> list[Record]:
    """Return what models' headers say; blocking.

    In folders on disks of this machine one after the other: the kernel reads ahead, and several
    threads would take turns at the interpreter and twice as long.
    """
    if not found:
        return []
    if are_local({model.path.parent for model in found}):
        for model in found:
            _read_ahead(model.path)
        return list(map(_read, found))
    with ThreadPoolExecutor(_N_READERS) as pool:
        return list(pool.map(_read, found))


def _read_ahead(path: Path) -> None:
    """Have the kernel begin to read a file's header; what is wrong with it shows later."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _read(found: FoundModel) -> Record:
    """Return what a model's headers say; blocking. Never fails: it may be broken."""
    digest = hashlib.sha256(found.stamp.encode()).hexdigest()
    if found.problem is not None:
        return Record(kind="broken", digest=digest, error=found.problem, is_lasting=False)
    try:
        if found.is_listed:
            header = read_files([file.path for file in found.files])
        else:
            header = read_header(found.path)
        digest = _digest(header)
        return Record(kind="model", digest=digest, shape=describe_model(header))
    except NotAModelError as error:
        kind: Kind = "projector" if error.is_projector else "part"
        return Record(kind=kind, digest=digest, error=error.message)
    except GgufError as error:
        # A file that could not be opened may be opened next time with no change to itself.
        is_lasting = not isinstance(error.__cause__, OSError)
        return Record(kind="broken", digest=digest, error=error.message, is_lasting=is_lasting)


def model_of_files(files: Sequence[Path]) -> Model:
    """Return the model that files hold, all its shards in order, registered or not; blocking.

    Raises:
        GgufError: a file is broken.
    """
    header = read_header(files[0]) if len(files) == 1 else read_files(files)
    return Model(
        name=name_from_stem(files[0].stem),
        files=tuple(files),
        size_bytes=sum(path.stat().st_size for path in files),
        modified_s=max(path.stat().st_mtime for path in files),
        digest=_digest(header),
        source=str(files[0].parent),
        shape=describe_model(header),
    )


def _digest(header: Header) -> str:
    digest = hashlib.sha256()
    for shard in header.shards:
        digest.update(f"{shard.sha256} {shard.file_bytes}\n".encode())
    return digest.hexdigest()


class _Parts(msgspec.Struct):
    """What was found beside the models, by folder."""

    projectors: defaultdict[Path, list[Path]] = msgspec.field(
        default_factory=lambda: defaultdict(list)
    )
    # The names of the models in a folder.
    names: defaultdict[Path, set[str]] = msgspec.field(default_factory=lambda: defaultdict(set))
    # Projectors that can't be read, in words.
    broken: list[str] = msgspec.field(default_factory=list)

    def projector_of(self, model: FoundModel) -> Path | None:
        """Return the projector that lies beside a model and belongs to it."""
        folder = model.path.parent
        return pick_projector(
            model.path, self.projectors[folder], n_names_in_folder=len(self.names[folder])
        )


def _sort_out(
    scan: Scan, records: Sequence[Record]
) -> tuple[list[tuple[FoundModel, Record]], _Parts]:
    """Return the models, and the projectors among what was found."""
    found: list[tuple[FoundModel, Record]] = []
    parts = _Parts()
    for model, record in zip(scan.models, records, strict=True):
        folder = model.path.parent
        if record.kind == "projector":
            parts.projectors[folder].append(model.path)
        elif record.kind == "broken" and is_projector_name(model.path):
            parts.broken.append(record.error or "")
        elif record.kind != "part":
            found.append((model, record))
            parts.names[folder].add(name_from_stem(model.path.stem).name)
    return found, parts


def _make_model(
    named: Named,
    found: FoundModel,
    record: Record,
    projector: Path | None,
    settings: ModelSettings,
) -> Model:
    return Model(
        name=named.name,
        files=tuple(file.path for file in found.files),
        projector=projector,
        size_bytes=sum(file.size_bytes for file in found.files),
        modified_s=max(file.modified_s for file in found.files),
        digest=record.digest,
        source=found.source,
        tool=found.tool,
        aliases=tuple(dict.fromkeys((*_user_aliases(settings), *named.aliases))),
        settings=settings,
        shape=record.shape,
        error=record.error,
    )


def _user_aliases(settings: ModelSettings) -> list[ModelName]:
    names = []
    for text in settings.aliases or ():
        # A store is data from elsewhere: what is no name there names nothing.
        with contextlib.suppress(InvalidNameError):
            names.append(parse_model_name(text))
    return names
