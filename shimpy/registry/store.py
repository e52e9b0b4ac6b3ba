"""The models that shimpy itself keeps: files by digest, manifests and settings by name.

    <root>/lock                          held by the daemon that owns the store
    <root>/blobs, <root>/partial         see `blobs`
    <root>/manifests/<name>/<tag>.json   one per model ('/' in names is '%' on disk)
    <root>/settings/<name>/<tag>.json    what the user set about a model, of whatever source

A model is there once its manifest is: blobs are written before it, and removed after it. So
whenever the process dies, each model is whole or not there at all, and what is left over is
found by `gc`. One process owns a store; in it, any thread may call. All methods block on the
disk except `manifests`, `manifest` and `settings`, which answer from memory.

To install a model:

    with store.pinned(*digests):
        with store.blobs.begin(digest) as writer:     # goes on where an earlier one stopped
            writer.write(...); ...; writer.commit()   # or store.blobs.adopt(file, digest)
        store.put_manifest(Manifest(name=..., tag=..., files=(...), origin=Origin(...)))
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self, TypeVar

import msgspec

from shimpy.errors import (
    DiskFullError,
    NotFoundError,
    RegistryError,
    ShimpyError,
)
from shimpy.names import ModelName
from shimpy.registry import disk
from shimpy.registry.blobs import Blobs, StoredFile, hash_file
from shimpy.registry.manifest import (
    Manifest,
    ManifestFile,
    decode_manifest,
    encode_manifest,
    file_of,
    name_of_file,
)
from shimpy.registry.ownership import take_lock
from shimpy.registry.settings import NO_SETTINGS, ModelSettings

# What nothing refers to is left alone for so long: an upload that a create is to follow, a pull
# that may be asked for again.
YOUNG_S: Final = 3600.0
# And for so long when nobody asked to collect: the next start may go on with it.
LEFTOVER_S: Final = 7 * 24 * 3600.0


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """What the garbage collector did."""

    n_files: int = 0
    freed_bytes: int = 0
    # Unused too, but too young to go.
    n_kept: int = 0
    kept_bytes: int = 0
    # What it could not or would not touch, in words.
    problems: tuple[str, ...] = ()


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was read again; `problem` says what is wrong with it."""

    model: ModelName
    file: ManifestFile
    problem: str | None = None


T = TypeVar("T")
# Called with a file's name, the bytes read so far, and its size.
OnVerify = Callable[[str, int, int], None]


class Store:
    """The store under a folder, owned by this process until `close`."""

    def __init__(self, root: Path, *, hook: disk.Hook = disk.no_hook) -> None:
        """Take the store in `root`, made if it is not there.

        Args:
            root: the store's own folder.
            hook: called before each step that changes the disk; for tests.

        Raises:
            StoreLockedError: another process owns it; says which.
            RegistryError: the folder can't be made or read.
        """
        self.root = root
        self._hook = hook
        self.blobs = Blobs(root, hook=hook)
        self.manifest_folder = root / "manifests"
        self._settings_folder = root / "settings"
        self._lock = threading.RLock()
        self._pins: Counter[str] = Counter()
        self._manifests: Mapping[ModelName, Manifest] = MappingProxyType({})
        self._settings: Mapping[ModelName, ModelSettings] = MappingProxyType({})
        # Manifests that can't be read, and why; what they refer to is not known.
        self._damaged: dict[Path, str] = {}
        self._lock_file = take_lock(root / "lock", owned=f"the store {root}")
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process own the store."""
        os.close(self._lock_file)

    # --- models -----------------------------------------------------------------------------

    def manifests(self) -> tuple[Manifest, ...]:
        """Return all models of the store, sorted by name."""
        return tuple(self._manifests[name] for name in sorted(self._manifests))

    def manifest(self, name: ModelName) -> Manifest | None:
        """Return a model's manifest; None: the store has none of that name."""
        return self._manifests.get(name)

    @property
    def damaged(self) -> Mapping[Path, str]:
        """Manifest and settings files that can't be read, and why."""
        return MappingProxyType(dict(self._damaged))

    def is_damaged(self, name: ModelName) -> bool:
        """Whether the store has a manifest of that name which can't be read."""
        return file_of(self.manifest_folder, name) in self._damaged

    def path_of(self, file: ManifestFile) -> Path:
        """Return where a manifest's file lies."""
        return Path(file.path) if file.path else self.blobs.path(file.digest)

    def path_of_manifest(self, manifest: Manifest) -> Path:
        """Return where a manifest lies."""
        return file_of(self.manifest_folder, manifest.model_name)

    def put_manifest(self, manifest: Manifest) -> None:
        """Install a model, or put another in its place; its blobs are there already.

        Blobs that only the old one needed are removed.

        Raises:
            RegistryError: one of its files is missing or of another size than it says.
            DiskFullError: no room for the manifest; the old one is still there.
        """
        name = manifest.model_name
        for file in manifest.files:
            self._check_file(file)
        with self._changing():
            path = file_of(self.manifest_folder, name)
            disk.write_file(
                path, encode_manifest(manifest), hook=lambda step: self._hook(f"manifest: {step}")
            )
            old = self._manifests.get(name)
            self._damaged.pop(path, None)
            self._manifests = MappingProxyType({**self._manifests, name: manifest})
            if old is not None:
                self._remove_unused(old.digests)

    def copy(self, source: ModelName, target: ModelName) -> Manifest:
        """Give a model of the store a second name, with what the user set; no file is copied.

        Raises:
            NotFoundError: the store has no `source`.
        """
        with self._changing():
            manifest = self._manifests.get(source)
            if manifest is None:
                raise NotFoundError(f"model '{source}' not found")
            settings = self.settings(source).over(manifest.settings).without("aliases")
            copied = msgspec.structs.replace(
                manifest, name=target.name, tag=target.tag, settings=settings
            )
            self.put_manifest(copied)
            self.put_settings(target, NO_SETTINGS)
            return copied

    def remove(self, name: ModelName) -> int:
        """Remove a model with its settings, and the blobs that no other needs.

        Returns:
            The bytes that this freed.

        Raises:
            NotFoundError: the store has no such model.
        """
        with self._changing():
            manifest = self._manifests.get(name)
            path = file_of(self.manifest_folder, name)
            if manifest is None and path not in self._damaged:
                raise NotFoundError(f"model '{name}' not found")
            # First, so that they never outlive the model and meet another of its name.
            self.put_settings(name, NO_SETTINGS)
            disk.remove_file(path, hook=lambda step: self._hook(f"manifest: {step}"))
            _remove_if_empty(path.parent)
            self._damaged.pop(path, None)
            self._manifests = _less(self._manifests, name)
            return self._remove_unused(manifest.digests) if manifest is not None else 0

    # --- settings ---------------------------------------------------------------------------

    def settings(self, name: ModelName) -> ModelSettings:
        """Return what the user set about a model, of whatever source."""
        return self._settings.get(name, NO_SETTINGS)

    def put_settings(self, name: ModelName, settings: ModelSettings) -> None:
        """Keep what the user set about a model; it need not be one of the store's.

        Raises:
            DiskFullError: there is no room; the old settings are still there.
        """
        with self._changing():
            path = file_of(self._settings_folder, name)
            if settings.is_empty:
                if name in self._settings or path in self._damaged:
                    disk.remove_file(path, hook=lambda step: self._hook(f"settings: {step}"))
                    _remove_if_empty(path.parent)
                    self._settings = _less(self._settings, name)
                    self._damaged.pop(path, None)
                return
            data = msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n"
            disk.write_file(path, data, hook=lambda step: self._hook(f"settings: {step}"))
            self._settings = MappingProxyType({**self._settings, name: settings})
            self._damaged.pop(path, None)

    # --- upkeep -----------------------------------------------------------------------------

    @contextmanager
    def pinned(self, *keys: str) -> Iterator[None]:
        """Keep the garbage collector from blobs (by digest) and working folders (by key)."""
        with self._lock:
            self._pins.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(keys)
                self._pins = +self._pins

    def gc(self, *, min_age_s: float = YOUNG_S) -> Collected:
        """Remove what no model needs: blobs, partial blobs, working folders, temporary files.

        What changed in the last `min_age_s` seconds is left alone, and so is what is pinned or
        being written. While a manifest can't be read, no blob goes: it may need it.
        """
        with self._lock:
            needed = {d for m in self._manifests.values() for d in m.digests} | self._pins.keys()
            pinned_folders = {self.blobs.working_path(key) for key in self._pins}
            problems = self._unreadable_manifests()
            with disk.explained(self.root):
                unused = [
                    file
                    for file in self.blobs.leftovers()
                    if file.digest not in needed and file.path not in pinned_folders
                ]
                blobs = [] if problems else list(self.blobs.stored())
            unused += [file for file in blobs if file.digest and file.digest not in needed]
            newest_s = time.time() - min_age_s
            old = [file for file in unused if file.modified_s <= newest_s]
            removed = []
            for file in old:
                try:
                    self.blobs.remove_stored(file)
                except ShimpyError as error:
                    problems.append(error.message)
                else:
                    removed.append(file)
            kept = [file for file in unused if file.modified_s > newest_s]
            return Collected(
                n_files=len(removed),
                freed_bytes=_total(removed),
                n_kept=len(kept),
                kept_bytes=_total(kept),
                problems=tuple(problems),
            )

    def verify(self, name: ModelName, *, on_bytes: OnVerify) -> list[Verified]:
        """Read the files of one model again and compare them with its manifest.

        Args:
            name: a model of the store.
            on_bytes: told how far it is; what it raises ends the work.

        Raises:
            NotFoundError: the store has no such model.
        """
        manifest = self._manifests.get(name)
        if manifest is None:
            raise NotFoundError(f"model '{name}' not found")
        return [
            Verified(model=name, file=file, problem=self._problem_with(file, on_bytes))
            for file in manifest.files
        ]

    # --- within -----------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the store for a change; one that fails half-way leaves what is on the disk."""
        with self._lock:
            try:
                yield
            except (RegistryError, DiskFullError):
                self._load()
                raise

    def _load(self) -> None:
        self._damaged.clear()
        with disk.explained(self.root):
            for folder in (self.manifest_folder, self._settings_folder):
                for path in sorted(folder.rglob(f"{disk.TEMPORARY}*")):
                    # Nobody else writes here: whoever did is dead.
                    path.unlink()
        self._manifests = MappingProxyType(
            {m.model_name: m for _, m in self._read(self.manifest_folder, decode_manifest)}
        )
        self._settings = MappingProxyType(dict(self._read(self._settings_folder, _decode_settings)))

    def _read(
        self, folder: Path, decode: Callable[[bytes, Path], T]
    ) -> Iterator[tuple[ModelName, T]]:
        for path in sorted(folder.glob("*/*.json")):
            try:
                with disk.explained(path):
                    data = path.read_bytes()
                yield name_of_file(path), decode(data, path)
            except RegistryError as error:
                self._damaged[path] = error.message

    def _check_file(self, file: ManifestFile) -> None:
        path = self.path_of(file)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise RegistryError(f"{path}: is not there: {error.strerror or error}") from error
        if size != file.size_bytes:
            raise RegistryError(f"{path}: has {size} bytes, and {file.size_bytes} were expected")

    def _problem_with(self, file: ManifestFile, on_bytes: OnVerify) -> str | None:
        try:
            self._check_file(file)
            if not file.digest:
                return None
            path = self.path_of(file)
            digest = hash_file(path, on_bytes=lambda n: on_bytes(file.name, n, file.size_bytes))
        except RegistryError as error:
            return error.message
        if digest != file.digest:
            return f"{path}: is damaged: its digest is {digest}, and {file.digest} was expected"
        return None

    def _unreadable_manifests(self) -> list[str]:
        """Return in words which manifests can't be read; what they need is not known."""
        return [
            problem
            for path, problem in self._damaged.items()
            if path.is_relative_to(self.manifest_folder)
        ]

    def _remove_unused(self, digests: frozenset[str]) -> int:
        """Remove those of some blobs that nothing needs any more; return the bytes freed."""
        if self._unreadable_manifests():
            return 0
        needed = {d for m in self._manifests.values() for d in m.digests} | self._pins.keys()
        freed = 0
        for digest in sorted(digests - needed):
            # The model is gone or replaced, as was asked; `gc` will find what stays.
            with contextlib.suppress(RegistryError):
                freed += self.blobs.remove(digest)
        return freed


def _decode_settings(data: bytes, path: Path) -> ModelSettings:
    try:
        return msgspec.json.decode(data, type=ModelSettings)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path}: the settings can't be read: {error}") from error


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _less(mapping: Mapping[ModelName, T], name: ModelName) -> Mapping[ModelName, T]:
    return MappingProxyType({key: value for key, value in mapping.items() if key != name})


def _total(files: list[StoredFile]) -> int:
    return sum(file.size_bytes for file in files)
