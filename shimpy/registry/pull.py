"""Pulls a model into the store: found, weighed, fetched, proved, and only then listed.

Everything here blocks and runs in a thread of its own. What happens is told in events; what has
come is kept when a pull ends early, and the next one goes on from there.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

import msgspec

from shimpy.errors import DiskFullError, DoesNotFitError, GgufError, OfflineError
from shimpy.gguf.arch import ModelShape, describe_model
from shimpy.gguf.header import Header
from shimpy.gguf.reader import read_files
from shimpy.names import ModelName
from shimpy.registry.choice import Choice, Verdict, choose_offer
from shimpy.registry.fetch import Fetcher, Retries, Stop, working_key
from shimpy.registry.manifest import Manifest, ManifestFile
from shimpy.registry.offers import Offer
from shimpy.registry.preview import fetch_header
from shimpy.registry.reference import HUB, HubReference, Reference
from shimpy.registry.remote import RemoteFile
from shimpy.registry.settings import ModelSettings
from shimpy.registry.sources import Candidate, Source, Sources
from shimpy.registry.store import Store
from shimpy.units import MIB, format_bytes

# Left free on the disk: a full one harms more than a pull.
_HEADROOM: Final = 256 * MIB
# How often progress is told, and how often a wait for another pull looks up.
_TELL_EVERY_S: Final = 0.1
_LOOK_EVERY_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something is done now."""

    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """How the model will run here; told before its first byte comes."""

    name: ModelName
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a file is; `completed` never becomes less."""

    file: str
    # "": nobody knows it before the file is whole.
    digest: str
    # None: its server does not say.
    total: int | None
    completed: int


Event = Step | Planned | Progress
Report = Callable[[Event], None]


class Judge(Protocol):
    """Says how models would run on this machine."""

    @property
    def vram_bytes(self) -> int:
        """Free on all cards together when no model is loaded."""

    @property
    def ram_bytes(self) -> int:
        """Free in the host's memory likewise."""

    def weigh(self, name: str, shape: ModelShape) -> Verdict:
        """Return how a model would run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Puller:
    """Pulls models into a store; safe to use from several threads, each with a pull of its own."""

    store: Store
    sources: Sources
    # Why the network may not be used; None: it may.
    offline: str | None = None
    retries: Retries = field(default_factory=Retries)
    _busy: set[str] = field(default_factory=set)
    # What runs, by pull: the disk has been promised to it.
    _running: dict[object, Offer] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def pull(
        self, reference: Reference, *, judge: Judge, force: bool, report: Report, stop: Stop
    ) -> Manifest:
        """Return the manifest of a model, which is then there.

        1. Find what the reference means.
        2. Read headers, ask the judge, choose a quantization; refuse what can't run here.
        3. Look whether the disk has room for what is still to come.
        4. Fetch the files, each checked against its digest.
        5. Read the header of what came, and write the manifest.

        Raises:
            OfflineError: the network may not be used.
            NotFoundError: there is no such model.
            DoesNotFitError: it can't run on this machine, and was not forced.
            DiskFullError: there is no room; says how much is missing.
            ShimpyError: a server refused, failed too often, or sent what is no model.
            StoppedError: `stop` was set; what came is kept.
        """
        if self.offline is not None:
            raise OfflineError(f"{reference} is not pulled: {self.offline}")
        report(Step(status="pulling manifest"))
        work = _Work(reference=reference, force=force, report=report, stop=stop)
        source = self._find(work)
        candidate = self._choose(source, judge, work)
        digests = self._fetch_all(candidate.offer, work)
        return self._install(candidate, source, digests, work)

    # --- 1. find ----------------------------------------------------------------------------

    def _find(self, work: _Work) -> Source:
        reference = self._as_installed(work.reference)
        return self.retries.run(partial(self.sources.find, reference), work.stop)

    def _as_installed(self, reference: Reference) -> Reference:
        """Return a reference with the repository in the letters that the hub knows it by.

        Listed names are in lower case; the hub's are not.
        """
        if isinstance(reference, HubReference):
            name = f"{HUB}/{reference.repository}".lower()
            for manifest in self.store.manifests():
                origin = manifest.origin
                is_hub = origin is not None and origin.kind == "huggingface"
                if origin and is_hub and f"{HUB}/{origin.location}".lower() == name:
                    return replace(reference, repository=origin.location)
        return reference

    # --- 2. choose --------------------------------------------------------------------------

    def _choose(self, source: Source, judge: Judge, work: _Work) -> Candidate:
        """Return the candidate that is to be pulled; errors as `pull`."""
        offers = {id(candidate.offer): candidate for candidate in source.candidates}

        def weigh(offer: Offer) -> Verdict:
            return self._weigh(offers[id(offer)], judge, work)

        choice = choose_offer(
            [candidate.offer for candidate in source.candidates],
            weigh,
            vram_bytes=judge.vram_bytes,
            ram_bytes=judge.ram_bytes,
        )
        candidate = offers[id(choice.offer)]
        if len(source.candidates) > 1:
            work.report(Step(status=_describe(choice, source)))
        verdict = choice.verdict or weigh(choice.offer)
        work.report(Planned(name=candidate.name, verdict=verdict))
        if not verdict.fits and not work.force:
            raise DoesNotFitError(
                f"{candidate.name} is not pulled: {verdict.headline}: {verdict.reason}. "
                "`--force` pulls it all the same"
            )
        return candidate

    def _weigh(self, candidate: Candidate, judge: Judge, work: _Work) -> Verdict:
        header = self._preview(candidate.offer, work)
        try:
            return judge.weigh(str(candidate.name), describe_model(header))
        except GgufError as error:
            size = format_bytes(candidate.offer.size_bytes)
            return Verdict(
                fits=False,
                is_in_vram=False,
                headline=f"{size}: can't be run",
                reason=error.message,
                plan={},
            )

    def _preview(self, offer: Offer, work: _Work) -> Header:
        return fetch_header(offer.files, lambda read: self.retries.run(read, work.stop))

    # --- 3. and 4. fetch --------------------------------------------------------------------

    def _fetch_all(self, offer: Offer, work: _Work) -> dict[str, str]:
        """Return the digest of each file by its path, all of them being blobs by then."""
        keys = [file.digest or working_key(file) for file in offer.all_files]
        digests = {}
        with self.store.pinned(*keys), self._room(offer, work):
            for file in offer.all_files:
                digests[file.path] = self._fetch(file, work)
        return digests

    def _fetch(self, file: RemoteFile, work: _Work) -> str:
        meter = _Meter(file, work.report)
        with self._turn(file, meter, work.stop):
            if file.digest and file.digest in self.store.blobs:
                meter.tell(file.size_bytes or 0, is_last=True)
                return file.digest
            fetcher = Fetcher(blobs=self.store.blobs, retries=self.retries)
            digest = fetcher.fetch(file, stop=work.stop, on_progress=meter.tell)
            meter.tell(self.store.blobs.size(digest), is_last=True)
            return digest

    @contextmanager
    def _turn(self, file: RemoteFile, meter: _Meter, stop: Stop) -> Iterator[None]:
        """Be the only one that fetches a file; another pull may be at it already."""
        key = file.digest or working_key(file)
        with self._changed:
            while key in self._busy:
                stop.check()
                meter.tell(self._begun_bytes(file))
                self._changed.wait(_LOOK_EVERY_S)
            self._busy.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(key)
                self._changed.notify_all()

    @contextmanager
    def _room(self, offer: Offer, work: _Work) -> Iterator[None]:
        """Hold the disk's room for what is still to come of a model, other pulls considered.

        Raises:
            DiskFullError: it has not that much.
        """
        missing = self._missing_bytes(offer)
        with self._changed:
            free = shutil.disk_usage(self.store.root).free
            others = sum(map(self._missing_bytes, self._running.values()))
            lacking = missing + others + _HEADROOM - free
            if missing and lacking > 0:
                promised = f", {format_bytes(others)} of it for other pulls" if others else ""
                raise DiskFullError(
                    f"{work.reference} is not pulled: {format_bytes(missing)} are still to come, "
                    f"and {self.store.root} has {format_bytes(free)} free{promised}; "
                    f"{format_bytes(lacking)} are missing. `shimpy rm` and `shimpy gc` make room, "
                    "data_dir puts the store elsewhere"
                )
            self._running[work] = offer
        try:
            yield
        finally:
            with self._changed:
                del self._running[work]

    def _missing_bytes(self, offer: Offer) -> int:
        """Return what is still to come of a model."""
        return sum(
            max(0, (file.size_bytes or 0) - self._begun_bytes(file)) for file in offer.all_files
        )

    def _begun_bytes(self, file: RemoteFile) -> int:
        """Return what is there of a file already."""
        blobs = self.store.blobs
        if file.digest and file.digest in blobs:
            return file.size_bytes or 0
        return blobs.begun_bytes(file.digest or working_key(file))

    # --- 5. install -------------------------------------------------------------------------

    def _install(
        self, candidate: Candidate, source: Source, digests: dict[str, str], work: _Work
    ) -> Manifest:
        """Write the manifest of a model whose files are there; errors as `pull`."""
        work.report(Step(status="verifying sha256 digest"))
        offer, blobs = candidate.offer, self.store.blobs
        with self.store.pinned(*digests.values()):
            try:
                describe_model(read_files([blobs.path(digests[f.path]) for f in offer.files]))
            except GgufError:
                if not work.force:
                    self._discard(digests)
                    raise
            work.stop.check()
            work.report(Step(status="writing manifest"))
            aliases = [str(alias) for alias in source.aliases if alias != candidate.name]
            own = ModelSettings(aliases=tuple(aliases) or None)
            manifest = Manifest(
                name=candidate.name.name,
                tag=candidate.name.tag,
                files=tuple(
                    ManifestFile(
                        role="projector" if file is offer.projector else "model",
                        name=file.name,
                        size_bytes=blobs.size(digests[file.path]),
                        digest=digests[file.path],
                    )
                    for file in offer.all_files
                ),
                origin=candidate.origin,
                settings=own.over(candidate.settings),
                created_s=time.time(),
            )
            self.store.put_manifest(manifest)
        self._take_aliases(candidate.name, set(aliases))
        return manifest

    def _take_aliases(self, name: ModelName, aliases: set[str]) -> None:
        """Let a name mean the model that was pulled under it last."""
        for manifest in self.store.manifests():
            kept = tuple(a for a in manifest.settings.aliases or () if a not in aliases)
            if manifest.model_name != name and kept != (manifest.settings.aliases or ()):
                settings = msgspec.structs.replace(manifest.settings, aliases=kept or None)
                self.store.put_manifest(msgspec.structs.replace(manifest, settings=settings))

    def _discard(self, digests: dict[str, str]) -> None:
        """Remove files that turned out to be no model, unless one needs them."""
        needed = {digest for manifest in self.store.manifests() for digest in manifest.digests}
        for digest in set(digests.values()) - needed:
            self.store.blobs.remove(digest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """One pull."""

    reference: Reference
    force: bool
    report: Report
    stop: Stop


class _Meter:
    """Tells how far a file is, now and then, and never less than before."""

    def __init__(self, file: RemoteFile, report: Report) -> None:
        self._file = file
        self._report = report
        self._most = 0
        self._told_s = 0.0

    def tell(self, n_bytes: int, *, is_last: bool = False) -> None:
        """Take note that so many bytes are there."""
        self._most = max(self._most, n_bytes)
        now = time.monotonic()
        if not is_last and now - self._told_s < _TELL_EVERY_S:
            return
        self._told_s = now
        self._report(
            Progress(
                file=self._file.name,
                digest=self._file.digest,
                total=self._file.size_bytes,
                completed=self._most,
            )
        )


def _describe(choice: Choice, source: Source) -> str:
    tags = ", ".join(candidate.offer.quantization for candidate in source.candidates)
    return f"taking {choice.offer.quantization} out of {tags}: {choice.why}"
