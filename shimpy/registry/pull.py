"""Pulls a model into the store: found, weighed, fetched, proved, and only then listed.

Everything here blocks and runs in a thread of its own. What happens is told in events; what has
come is kept when a pull ends early, and the next one goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec
from msgspec.structs import replace

from shimpy.errors import DoesNotFitError, GgufError, OfflineError
from shimpy.gguf.arch import ModelShape, describe_model
from shimpy.gguf.header import Header
from shimpy.gguf.reader import read_files
from shimpy.names import ModelName
from shimpy.registry.attempts import Retries, Stop
from shimpy.registry.choice import Choice, Verdict, choose_offer
from shimpy.registry.downloads import Downloads, Progress
from shimpy.registry.manifest import Manifest, ManifestFile
from shimpy.registry.offers import Offer
from shimpy.registry.preview import fetch_header
from shimpy.registry.reference import HUB, HubReference, Reference
from shimpy.registry.settings import ModelSettings
from shimpy.registry.sources import Candidate, Source, Sources
from shimpy.registry.store import Store
from shimpy.units import format_bytes


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Something is done now."""

    status: str


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """How the model will run here; told before its first byte comes."""

    name: ModelName
    verdict: Verdict


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


class Puller:
    """Pulls models into a store; safe to use from several threads, each with a pull of its own."""

    def __init__(
        self,
        store: Store,
        sources: Sources,
        *,
        offline: str | None = None,
        retries: Retries | None = None,
    ) -> None:
        """Pull from `sources` into `store`.

        Args:
            store: this process's own.
            sources: say what references mean.
            offline: why the network may not be used; None: it may.
            retries: how often what fails in passing is tried.
        """
        self.sources = sources
        self._store = store
        self._offline = offline
        self._retries = retries or Retries()
        self._downloads = Downloads(store, self._retries)

    def pull(
        self, reference: Reference, *, judge: Judge, force: bool, report: Report, stop: Stop
    ) -> Manifest:
        """Return the manifest of a model, which is then there.

        1. Find what the reference means.
        2. Read headers, ask the judge, choose a quantization; refuse what can't run here.
        3. Look whether the disk has room, and fetch the files, each checked by its digest.
        4. Read the header of what came, and write the manifest.

        Raises:
            OfflineError: the network may not be used.
            NotFoundError: there is no such model.
            DoesNotFitError: it can't run on this machine, and was not forced.
            DiskFullError: there is no room; says how much is missing.
            ShimpyError: a server refused, failed too often, or sent what is no model.
            StoppedError: `stop` was set; what came is kept.
        """
        if self._offline is not None:
            raise OfflineError(f"{reference} is not pulled: {self._offline}")
        report(Step(status="pulling manifest"))
        work = _Work(reference=reference, force=force, report=report, stop=stop)
        source = self._find(work)
        candidate = self._choose(source, judge, work)
        with self._downloads.fetched(
            candidate.offer.all_files, what=str(reference), stop=stop, on_progress=report
        ) as digests:
            return self._install(candidate, source, digests, work)

    # --- 1. find ----------------------------------------------------------------------------

    def _find(self, work: _Work) -> Source:
        reference = self._as_installed(work.reference)
        return self._retries.run(partial(self.sources.find, reference), work.stop, work.say)

    def _as_installed(self, reference: Reference) -> Reference:
        """Return a reference with the repository in the letters that the hub knows it by.

        Listed names are in lower case; the hub's are not.
        """
        if isinstance(reference, HubReference):
            name = f"{HUB}/{reference.repository}".lower()
            for manifest in self._store.manifests():
                origin = manifest.origin
                if origin is None or origin.kind != "huggingface":
                    continue
                if f"{HUB}/{origin.location}".lower() == name:
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
            work.say(_describe(choice, source))
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
        return fetch_header(offer.files, lambda read: self._retries.run(read, work.stop, work.say))

    # --- 4. install -------------------------------------------------------------------------

    def _install(
        self, candidate: Candidate, source: Source, digests: dict[str, str], work: _Work
    ) -> Manifest:
        """Write the manifest of a model whose files are there; errors as `pull`."""
        work.say("verifying sha256 digest")
        offer, blobs = candidate.offer, self._store.blobs
        try:
            describe_model(read_files([blobs.path(digests[file.path]) for file in offer.files]))
        except GgufError:
            if not work.force:
                self._discard(digests)
                raise
        work.stop.check()
        work.say("writing manifest")
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
        self._store.put_manifest(manifest)
        self._take_aliases(candidate.name, set(aliases))
        return manifest

    def _take_aliases(self, name: ModelName, aliases: set[str]) -> None:
        """Let a name mean the model that was pulled under it last."""
        for manifest in self._store.manifests():
            kept = tuple(a for a in manifest.settings.aliases or () if a not in aliases)
            if manifest.model_name != name and kept != (manifest.settings.aliases or ()):
                settings = replace(manifest.settings, aliases=kept or None)
                self._store.put_manifest(replace(manifest, settings=settings))

    def _discard(self, digests: dict[str, str]) -> None:
        """Remove files that turned out to be no model, unless one needs them."""
        needed = {digest for manifest in self._store.manifests() for digest in manifest.digests}
        for digest in set(digests.values()) - needed:
            self._store.blobs.remove(digest)


class _Work(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One pull."""

    reference: Reference
    force: bool
    report: Report
    stop: Stop

    def say(self, status: str) -> None:
        """Tell in words what is done now."""
        self.report(Step(status=status))


def _describe(choice: Choice, source: Source) -> str:
    tags = ", ".join(candidate.offer.quantization for candidate in source.candidates)
    return f"taking {choice.offer.quantization} out of {tags}: {choice.why}"
