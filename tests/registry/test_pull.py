"""Whole pulls into a real store, from a hub that fails."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from gguf import GGUFWriter

from shimpy.errors import (
    DiskFullError,
    DoesNotFitError,
    GgufError,
    NotFoundError,
    OfflineError,
    RemoteError,
    UnsupportedError,
    UserError,
)
from shimpy.gguf.arch import ModelShape
from shimpy.names import ModelName
from shimpy.registry.attempts import Retries, Stop, StoppedError
from shimpy.registry.blobs import DigestMismatchError
from shimpy.registry.catalog import load_catalog
from shimpy.registry.choice import Verdict
from shimpy.registry.downloads import Progress
from shimpy.registry.manifest import Manifest
from shimpy.registry.own import StoreModels
from shimpy.registry.pull import Event, Planned, Puller, Step
from shimpy.registry.reference import parse_reference
from shimpy.registry.registry import Registry
from shimpy.registry.sources import Sources
from shimpy.registry.store import Store
from tests.hub_server import Fault, HubServer
from tests.hubs import hub
from tests.synthetic import write_deepseek, write_llama

__all__ = ["hub"]

OWN_CATALOG = """
[models.tiny]
title = "Tiny"
repo = "org/Tiny-GGUF"
license = "MIT"
options = { temperature = 0.5 }
aliases = ["small:1b"]

[models.parted]
title = "One repository for each quantization"
tags = { f16 = "org/tiny-f16", q8_0 = "org/tiny-q8", q4_0 = "org/gone" }
"""


@dataclass(slots=True)
class Memory:
    """A judge for a machine that runs what fits into its VRAM and RAM."""

    vram_bytes: int = 0
    ram_bytes: int = 1 << 40

    def weigh(self, name: str, shape: ModelShape) -> Verdict:
        fits = shape.file_bytes <= self.vram_bytes + self.ram_bytes
        return Verdict(
            fits=fits,
            is_in_vram=shape.file_bytes <= self.vram_bytes,
            headline=f"{shape.file_bytes} bytes: {'will run' if fits else 'too large'}",
            reason=f"{name} weighed",
            plan={"model": name},
        )


class Pulling:
    """A store and pulls into it."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.hub = server
        self.store = Store(folder / "store")
        catalog_file = folder / "registry.toml"
        catalog_file.write_text(OWN_CATALOG)
        catalog = load_catalog(catalog_file)
        self.puller = self._puller(Sources(catalog=lambda: catalog))
        self.index = folder / "index.sqlite"
        self.events: list[Event] = []

    def _puller(self, sources: Sources, offline: str | None = None) -> Puller:
        return Puller(
            self.store,
            sources,
            offline=offline,
            retries=Retries(most=3, first_pause_s=0.001),
        )

    def go_offline(self) -> None:
        self.puller = self._puller(self.puller.sources, offline="the setting `offline` is on")

    def pull(
        self,
        text: str,
        *,
        judge: Memory | None = None,
        force: bool = False,
        stop: Stop | None = None,
    ) -> Manifest:
        return self.puller.pull(
            parse_reference(text),
            judge=judge or Memory(),
            force=force,
            report=self.events.append,
            stop=stop or Stop(),
        )

    def names(self) -> list[str]:
        """What is listed, by a registry over the store."""
        registry = Registry([], index_path=self.index, before=[StoreModels(self.store)])
        registry.refresh()
        return [str(model.name) for model in registry.models()]

    @property
    def steps(self) -> list[str]:
        return [event.status for event in self.events if isinstance(event, Step)]

    def data(self, manifest: Manifest) -> list[bytes]:
        return [self.store.path_of(file).read_bytes() for file in manifest.files]


@pytest.fixture
def pulling(hub: HubServer, tmp_path: Path) -> Iterator[Pulling]:
    pulls = Pulling(hub, tmp_path)
    yield pulls
    pulls.puller.sources.web.close()
    pulls.store.close()


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in three quantizations; the biggest first."""
    folder = tmp_path_factory.mktemp("sizes")
    return {
        quant: write_llama(folder / f"Tiny-{quant.upper()}.gguf", quant=quant)
        for quant in ("f16", "q8_0", "q4_0")
    }


@pytest.fixture
def tiny(hub: HubServer, sizes: dict[str, Path]) -> dict[str, Path]:
    files: dict[str, bytes | Path] = {path.name: path for path in sizes.values()}
    hub.add("org/Tiny-GGUF", {**files, "README.md": b"# Tiny"})
    return sizes


# --- what a name means ------------------------------------------------------------------------


def test_a_catalog_name_with_its_tag(pulling: Pulling, tiny: dict[str, Path]) -> None:
    manifest = pulling.pull("tiny:q8_0")
    assert manifest.model_name == ModelName("tiny", "q8_0")
    assert pulling.data(manifest) == [tiny["q8_0"].read_bytes()]
    assert manifest.origin is not None
    assert (manifest.origin.kind, manifest.origin.location) == ("huggingface", "org/Tiny-GGUF")
    assert manifest.settings.license == "MIT"
    assert pulling.names() == ["tiny:q8_0"]
    assert pulling.steps == ["pulling manifest", "verifying sha256 digest", "writing manifest"]


def test_without_a_tag_the_best_for_the_machine_and_why(
    pulling: Pulling, tiny: dict[str, Path]
) -> None:
    manifest = pulling.pull("tiny", judge=Memory(vram_bytes=1 << 30))
    assert manifest.tag == "q8_0"
    assert "taking q8_0 out of f16, q4_0, q8_0: the most bits" in pulling.steps[1]
    manifest = pulling.pull("tiny", judge=Memory())
    assert manifest.tag == "q4_0"


def test_what_was_pulled_without_a_tag_answers_to_the_plain_name(
    pulling: Pulling, tiny: dict[str, Path]
) -> None:
    """And to the catalog's other names; a later pull takes them over."""
    assert pulling.pull("small:1b").settings.aliases == ("small:1b", "tiny:latest")
    again = pulling.pull("tiny", judge=Memory(vram_bytes=1 << 30))
    assert again.settings.aliases == ("tiny:latest", "small:1b")
    first = pulling.store.manifest(ModelName("tiny", "q4_0"))
    assert first is not None
    assert first.settings.aliases is None
    assert pulling.names() == ["tiny:q4_0", "tiny:q8_0"]


def test_a_catalog_entry_with_a_repository_for_each_tag(
    pulling: Pulling, hub: HubServer, sizes: dict[str, Path]
) -> None:
    """One that is missing does not take the others with it."""
    hub.add("org/tiny-f16", {"x-F16.gguf": sizes["f16"]})
    hub.add("org/tiny-q8", {"x-Q8_0.gguf": sizes["q8_0"]})
    assert pulling.pull("parted:f16").tag == "f16"
    assert pulling.pull("parted").tag == "q8_0"
    with pytest.raises(NotFoundError, match="no repository org/gone"):
        pulling.pull("parted:q4_0")
    with pytest.raises(NotFoundError, match="no q2_k of parted; it has f16, q8_0, q4_0"):
        pulling.pull("parted:q2_k")


@pytest.mark.parametrize(
    ("text", "name", "quant"),
    [
        ("hf.co/org/Tiny-GGUF:Q8_0", "hf.co/org/tiny-gguf:q8_0", "q8_0"),
        ("huggingface.co/org/Tiny-GGUF", "hf.co/org/tiny-gguf:q4_0", "q4_0"),
        ("org/Tiny-GGUF/Tiny-F16.gguf", "hf.co/org/tiny-gguf:f16", "f16"),
    ],
)
def test_a_repository_of_the_hub(
    pulling: Pulling, tiny: dict[str, Path], text: str, name: str, quant: str
) -> None:
    manifest = pulling.pull(text)
    assert str(manifest.model_name) == name
    assert pulling.data(manifest) == [tiny[quant].read_bytes()]
    assert manifest.settings.license == "apache-2.0"


def test_a_file_that_its_quantization_does_not_tell_is_named_by_its_own_name(
    pulling: Pulling, hub: HubServer, sizes: dict[str, Path]
) -> None:
    hub.add("org/many", {"a-Q8_0.gguf": sizes["q8_0"], "b-Q8_0.gguf": sizes["q4_0"]})
    assert str(pulling.pull("org/many/b-Q8_0.gguf").model_name) == "hf.co/org/many/b:q8_0"


def test_a_listed_name_is_pulled_again_in_the_hubs_letters(
    pulling: Pulling, tiny: dict[str, Path]
) -> None:
    """Names are in lower case; the hub's are not."""
    pulling.pull("hf.co/org/Tiny-GGUF:q8_0")
    assert pulling.pull("hf.co/org/tiny-gguf:q8_0").tag == "q8_0"


def test_a_plain_address(pulling: Pulling, hub: HubServer, sizes: dict[str, Path]) -> None:
    hub.plain["some/tiny-Q8_0.gguf"] = sizes["q8_0"].read_bytes()
    manifest = pulling.pull(f"{hub.url}/files/some/tiny-Q8_0.gguf")
    assert str(manifest.model_name) == "127.0.0.1/tiny:q8_0"
    assert manifest.settings.aliases == ("tiny:q8_0",)
    assert pulling.data(manifest) == [sizes["q8_0"].read_bytes()]
    assert manifest.files[0].digest in pulling.store.blobs


def test_a_model_of_an_ollama_registry(
    pulling: Pulling, hub: HubServer, sizes: dict[str, Path]
) -> None:
    hub.ollama["library/tiny:1b"] = [
        ("model", sizes["q8_0"].read_bytes()),
        ("params", b'{"temperature": 0.25}'),
        ("system", b"Be kind."),
    ]
    manifest = pulling.pull(f"ollama:http://127.0.0.1:{hub.port}/library/tiny:1b")
    assert str(manifest.model_name) == f"ollama/127.0.0.1-{hub.port}/tiny:1b"
    assert manifest.settings.parameters == {"temperature": 0.25}
    assert manifest.settings.system == "Be kind."
    assert manifest.settings.aliases == ("tiny:1b",)
    assert pulling.data(manifest) == [sizes["q8_0"].read_bytes()]


def test_a_split_model_with_its_projector(pulling: Pulling, hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    write_deepseek(folder / "moe.gguf", split_max_tensors=12)
    shards = sorted(folder.glob("*.gguf"))
    files: dict[str, bytes | Path] = {f"Q8_0/{path.name}": path for path in shards}
    hub.add("org/moe", {**files, "Q8_0/mmproj-F16.gguf": b"GGUF projector"})
    manifest = pulling.pull("hf.co/org/moe")
    assert [file.role for file in manifest.files] == ["model"] * len(shards) + ["projector"]
    assert [file.name for file in manifest.files][:-1] == [path.name for path in shards]
    assert pulling.data(manifest)[-1] == b"GGUF projector"
    told = {event.file for event in pulling.events if isinstance(event, Progress)}
    assert len(told) == len(shards) + 1


# --- the plan before the bytes ----------------------------------------------------------------


def test_the_plan_is_told_before_the_first_byte_of_the_model(
    pulling: Pulling, tiny: dict[str, Path]
) -> None:
    pulling.pull("tiny:q8_0")
    kinds = [type(event) for event in pulling.events]
    assert kinds.index(Planned) < kinds.index(Progress)
    planned = next(event for event in pulling.events if isinstance(event, Planned))
    assert planned.name == ModelName("tiny", "q8_0")
    assert planned.verdict.plan == {"model": "tiny:q8_0"}


def test_what_can_not_run_here_is_refused_before_its_bytes(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer
) -> None:
    with pytest.raises(DoesNotFitError, match=r"too large: tiny:q8_0 weighed.*--force"):
        pulling.pull("tiny:q8_0", judge=Memory(ram_bytes=10))
    assert not any(isinstance(event, Progress) for event in pulling.events)
    assert pulling.names() == []


def test_force_pulls_what_can_not_run_here(pulling: Pulling, tiny: dict[str, Path]) -> None:
    assert pulling.pull("tiny:q8_0", judge=Memory(ram_bytes=10), force=True).tag == "q8_0"


def test_where_nothing_fits_the_smallest_is_named(pulling: Pulling, tiny: dict[str, Path]) -> None:
    with pytest.raises(DoesNotFitError, match="tiny:q4_0 is not pulled"):
        pulling.pull("tiny", judge=Memory(ram_bytes=10))


def test_what_is_no_model_is_refused_before_its_bytes(pulling: Pulling, hub: HubServer) -> None:
    hub.add("org/page", {"page-Q8_0.gguf": b"<!DOCTYPE html>" + b"x" * 2_000_000})
    with pytest.raises(GgufError, match="web page"):
        pulling.pull("hf.co/org/page")
    assert hub.sent() < 600_000


def test_a_projector_alone_can_not_be_run(pulling: Pulling, hub: HubServer, tmp_path: Path) -> None:
    """It is a GGUF file, but no model; the plan says so."""
    writer = GGUFWriter(tmp_path / "vision-F16.gguf", "clip")
    writer.add_name("vision")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    hub.add("org/vision", {"vision-F16.gguf": tmp_path / "vision-F16.gguf"})
    with pytest.raises(DoesNotFitError, match=r"can't be run: .*projector"):
        pulling.pull("hf.co/org/vision")


def test_what_turns_out_to_be_no_model_is_not_kept(
    pulling: Pulling, hub: HubServer, sizes: dict[str, Path]
) -> None:
    """A server may send another beginning the second time; a plain file has no digest."""
    good = sizes["q8_0"].read_bytes()
    hub.plain["x-Q8_0.gguf"] = good

    def swap(event: Event) -> None:
        if isinstance(event, Planned):
            hub.plain["x-Q8_0.gguf"] = b"X" * len(good)

    with pytest.raises(GgufError):
        pulling.puller.pull(
            parse_reference(f"{hub.url}/files/x-Q8_0.gguf"),
            judge=Memory(),
            force=False,
            report=swap,
            stop=Stop(),
        )
    assert pulling.names() == []
    assert not list(pulling.store.blobs.stored())


# --- failing ----------------------------------------------------------------------------------


def test_offline_refuses_at_once(pulling: Pulling, tiny: dict[str, Path], hub: HubServer) -> None:
    pulling.go_offline()
    with pytest.raises(OfflineError, match="`offline` is on"):
        pulling.pull("tiny:q8_0")
    assert hub.seen == []


def test_the_hubs_own_offline_variable_is_honoured(
    pulling: Pulling, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        pulling.pull("tiny:q8_0")


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("nope", NotFoundError, 'catalog has no "nope"'),
        ("grin-moe", UnsupportedError, "no converter"),
        ("demo", UserError, "comes with shimpy"),
        ("hf.co/org/nope", NotFoundError, r"no repository org/nope .*Invalid username"),
        ("hf.co/org/Tiny-GGUF:Q2_K", NotFoundError, "no Q2_K; it has f16, q4_0, q8_0"),
        ("hf.co/org/Tiny-GGUF/x.gguf", NotFoundError, "no model x.gguf; it has Tiny-F16.gguf"),
        ("hf.co/org/empty", NotFoundError, "holds no GGUF model"),
    ],
)
def test_what_is_not_there_is_told(
    pulling: Pulling, tiny: dict[str, Path], text: str, error: type[Exception], said: str
) -> None:
    pulling.hub.add("org/empty", {"README.md": b""})
    with pytest.raises(error, match=said):
        pulling.pull(text)
    assert pulling.names() == []


def test_a_gated_repository_gives_the_hubs_reason_and_opens_with_a_token(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/Tiny-GGUF"].is_gated = True
    with pytest.raises(RemoteError, match=r"is gated: Access to model org/Tiny-GGUF is restricted"):
        pulling.pull("tiny:q8_0")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert pulling.pull("tiny:q8_0").tag == "q8_0"


def test_a_private_repository_is_told_from_a_missing_one_only_with_a_token(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/Tiny-GGUF"].is_private = True
    with pytest.raises(NotFoundError, match="If it is private, set HF_TOKEN"):
        pulling.pull("tiny:q8_0")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert pulling.pull("tiny:q8_0").tag == "q8_0"


def test_a_busy_hub_is_asked_again(pulling: Pulling, tiny: dict[str, Path], hub: HubServer) -> None:
    hub.faults = [Fault(where="api", status=503), Fault(where="api", status=429)]
    assert pulling.pull("tiny:q8_0").tag == "q8_0"


def test_the_environments_proxy_is_used(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's name leads nowhere; whoever gets there went through the proxy."""
    address = "http://hub.invalid"
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.setenv("NO_PROXY", "localhost")
    huggingface_hub.close_session()
    assert pulling.pull("tiny:q8_0").tag == "q8_0"


def test_a_hub_that_does_not_answer_is_given_up(
    pulling: Pulling, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match="3 attempts"):
        pulling.pull("tiny:q8_0")


def test_too_little_room_is_told_with_the_figures_before_the_bytes(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr("shimpy.registry.downloads.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"still to come, and .* has 1000 B free; .* missing"):
        pulling.pull("tiny:q8_0")
    assert not any(isinstance(event, Progress) for event in pulling.events)


def test_what_is_here_already_needs_no_room(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulling.pull("tiny:q8_0")
    usage = shutil._ntuple_diskusage(10**9, 10**9, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr("shimpy.registry.downloads.shutil.disk_usage", lambda _: usage)
    sent = hub.sent()
    assert pulling.pull("tiny:q8_0").tag == "q8_0"
    assert hub.sent() - sent < 600_000


def test_a_disk_that_fills_up_leaves_nothing_listed(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    root = pulling.store.root
    pulling.store.close()
    full = True

    def fill(step: str) -> None:
        if full and step == "blob: write":
            raise OSError(errno.ENOSPC, "No space left on device")

    pulling.store = Store(root, hook=fill)
    pulling.puller = pulling._puller(pulling.puller.sources)
    with pytest.raises(DiskFullError, match="no room on the disk"):
        pulling.pull("tiny:q8_0")
    assert pulling.names() == []
    full = False
    assert pulling.pull("tiny:q8_0").tag == "q8_0"


def test_a_wrong_hash_leaves_nothing(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer
) -> None:
    def spoil(event: Event) -> None:
        if isinstance(event, Planned):
            hub.faults = [Fault(flip=True)]

    with pytest.raises(DigestMismatchError, match="Nothing of it was kept"):
        pulling.puller.pull(
            parse_reference("tiny:q8_0"), judge=Memory(), force=False, report=spoil, stop=Stop()
        )
    assert pulling.names() == []
    assert not list(pulling.store.blobs.stored())
    assert not list(pulling.store.blobs.leftovers())


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop_after=50_000),
        Fault(stall_after=50_000),
        Fault(ignore_range=True),
        Fault(end_after=50_000),
        Fault(status=503),
        Fault(where="resolve", status=429, headers={"Retry-After": "0"}),
    ],
    ids=["drops", "stalls", "ignores ranges", "ends early", "is busy", "wants fewer"],
)
def test_a_pull_gets_through_a_bad_line(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, fault: Fault
) -> None:
    hub.faults = [fault, fault]
    manifest = pulling.pull("tiny:q8_0")
    assert pulling.data(manifest) == [tiny["q8_0"].read_bytes()]
    for file in {event.file for event in pulling.events if isinstance(event, Progress)}:
        done = [e.completed for e in pulling.events if isinstance(e, Progress) and e.file == file]
        assert done == sorted(done)


# --- several at once, and stopping ------------------------------------------------------------


def test_a_stopped_pull_keeps_what_came_and_lists_nothing(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer
) -> None:
    stop = Stop()

    def halt(event: Event) -> None:
        if isinstance(event, Progress):
            stop.set()

    with pytest.raises(StoppedError):
        pulling.puller.pull(
            parse_reference("tiny:f16"), judge=Memory(), force=False, report=halt, stop=stop
        )
    assert pulling.names() == []


def test_two_pulls_of_one_file_fetch_it_once(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer
) -> None:
    """Under two names: the catalog's and the repository's."""
    manifests: list[Manifest] = []
    threads = [
        threading.Thread(target=lambda text=text: manifests.append(pulling.pull(text)))
        for text in ("tiny:f16", "hf.co/org/Tiny-GGUF:f16")
    ]
    size = tiny["f16"].stat().st_size
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(str(manifest.model_name) for manifest in manifests) == [
        "hf.co/org/tiny-gguf:f16",
        "tiny:f16",
    ]
    # The file once, and two looks at its header.
    whole = [s for s in hub.seen if s.where == "storage" and s.range == ""]
    assert len(whole) == 1
    assert whole[0].n_bytes == size
    assert len(list(pulling.store.blobs.stored())) == 1


def test_a_pull_over_an_older_one_removes_what_only_that_needed(
    pulling: Pulling, tiny: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    pulling.pull("tiny:q8_0")
    newer = write_llama(tmp_path / "newer.gguf", quant="q8_0", seed=7)
    hub.add("org/Tiny-GGUF", {"Tiny-Q8_0.gguf": newer})
    manifest = pulling.pull("tiny:q8_0")
    assert pulling.data(manifest) == [newer.read_bytes()]
    assert len(list(pulling.store.blobs.stored())) == 1
