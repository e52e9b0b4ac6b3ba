"""The models in the folders of this machine, by name: scanned, read once, resolved."""

from __future__ import annotations

import difflib
import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shimpy.errors import GgufError, NotFoundError
from shimpy.gguf.arch import NotAModelError, describe_model
from shimpy.gguf.header import Header
from shimpy.gguf.reader import read_header
from shimpy.names import DEFAULT_TAG, ModelName, name_from_stem, parse_model_name
from shimpy.registry.discovery import FoundModel, Scan, scan_folders
from shimpy.registry.index import HeaderIndex, Kind, Record, decode
from shimpy.registry.model import Model
from shimpy.registry.naming import assign_names, is_projector_name, pick_projector

# Reading headers waits for the disk more than it computes.
_N_READERS: Final = 4


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What a scan came to; replaced as a whole."""

    models: tuple[Model, ...] = ()
    problems: tuple[str, ...] = ()


class Registry:
    """The models in some folders.

    `refresh` blocks and is meant for a worker thread; scans that overlap wait for each other.
    The other methods answer from the last scan, from any thread, without touching the disk.
    """

    def __init__(self, folders: Sequence[Path], *, index_path: Path) -> None:
        self._folders = tuple(folders)
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

    def refresh(self) -> None:
        """Look at the folders again and read the headers of files that are new or changed."""
        with self._lock:
            scan = scan_folders(self._folders)
            records = self._look_up(scan)
            snapshot = _build_snapshot(scan, records)
            if self._index.problem is not None:
                snapshot = _Snapshot(
                    models=snapshot.models, problems=(*snapshot.problems, self._index.problem)
                )
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

        1. The name and tag as they stand.
        2. Without a tag, or with `latest`, the only model of that name that is not broken.

        Paths are no names: what is in no folder is out of reach.

        Raises:
            InvalidNameError: `text` is no name.
            NotFoundError: there is no such model; the message names what is near.
            GgufError: there is, but its file is broken.
        """
        wanted = parse_model_name(text)
        namesakes = [model for model in self.models() if model.name.name == wanted.name]
        exact = [model for model in namesakes if model.name.tag == wanted.tag]
        if exact:
            return _usable(exact[0])
        if wanted.tag == DEFAULT_TAG:
            whole = [model for model in namesakes if model.error is None] or namesakes
            if len(whole) == 1:
                return _usable(whole[0])
        raise NotFoundError(self._explain_missing(wanted, namesakes))

    def _explain_missing(self, wanted: ModelName, namesakes: list[Model]) -> str:
        if namesakes and wanted.tag == DEFAULT_TAG:
            tags = ", ".join(str(model.name) for model in namesakes)
            return f'"{wanted.name}" means {len(namesakes)} models; ask for one of them: {tags}'
        if namesakes:
            tags = ", ".join(str(model.name) for model in namesakes)
            return f'there is no model "{wanted}"; of that name there is {tags}'
        names = sorted({model.name.name for model in self.models()})
        near = difflib.get_close_matches(wanted.name, names, n=3)
        near += [name for name in names if wanted.name in name and name not in near][:3]
        if near:
            return f'there is no model "{wanted}"; did you mean {" or ".join(near[:3])}?'
        folders = ", ".join(map(str, self._folders)) or "none is set: see --model-dirs"
        return f'there is no model "{wanted}" (searched folders: {folders})'

    def _look_up(self, scan: Scan) -> list[Record]:
        """Return what is known of each found model, reading only what is new or changed."""
        if self._stored is None:
            self._stored = self._index.load()
            self._indexed = set(self._stored)
        records = [self._recall(model) for model in scan.models]
        unread = [m for m, record in zip(scan.models, records, strict=True) if record is None]
        with ThreadPoolExecutor(_N_READERS) as pool:
            read = dict(zip(map(_key, unread), pool.map(_read, unread), strict=True))
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
        if model.partial is not None:
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


def _key(model: FoundModel) -> str:
    return str(model.path)


def _is_below(path: Path, folders: Iterable[Path]) -> bool:
    return any(folder == path or folder in path.parents for folder in folders)


def _usable(model: Model) -> Model:
    if model.error is not None:
        raise GgufError(model.error)
    return model


def _read(found: FoundModel) -> Record:
    """Return what a model's headers say; blocking. Never fails: it may be broken."""
    digest = hashlib.sha256(found.stamp.encode()).hexdigest()
    if found.partial is not None:
        return Record(kind="broken", digest=digest, error=found.partial, is_lasting=False)
    try:
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


def _digest(header: Header) -> str:
    digest = hashlib.sha256()
    for shard in header.shards:
        digest.update(f"{shard.sha256} {shard.file_bytes}\n".encode())
    return digest.hexdigest()


def _build_snapshot(scan: Scan, records: Sequence[Record]) -> _Snapshot:
    """Return the models by name, each with its projector."""
    found: list[tuple[FoundModel, Record]] = []
    projectors: defaultdict[Path, list[Path]] = defaultdict(list)
    broken_projectors: list[str] = []
    for model, record in zip(scan.models, records, strict=True):
        if record.kind == "projector":
            projectors[model.path.parent].append(model.path)
        elif record.kind == "broken" and is_projector_name(model.path):
            broken_projectors.append(record.error or "")
        elif record.kind != "part":
            found.append((model, record))
    names, renamed = assign_names([model for model, _ in found])
    names_in: defaultdict[Path, set[str]] = defaultdict(set)
    for model, _ in found:
        names_in[model.path.parent].add(name_from_stem(model.path.stem).name)
    models = [
        _make_model(
            name,
            model,
            record,
            pick_projector(
                model.path,
                projectors[model.path.parent],
                n_names_in_folder=len(names_in[model.path.parent]),
            ),
        )
        for name, (model, record) in zip(names, found, strict=True)
        if name is not None
    ]
    models.sort(key=lambda model: model.name)
    return _Snapshot(models=tuple(models), problems=(*scan.problems, *broken_projectors, *renamed))


def _make_model(
    name: ModelName, found: FoundModel, record: Record, projector: Path | None
) -> Model:
    return Model(
        name=name,
        files=tuple(file.path for file in found.files),
        projector=projector,
        size_bytes=sum(file.size_bytes for file in found.files),
        modified_s=max(file.modified_s for file in found.files),
        digest=record.digest,
        source=found.source,
        shape=record.shape,
        error=record.error,
    )
