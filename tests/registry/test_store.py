"""What a store promises while nothing goes wrong, and what it says when something is."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shimpy.errors import (
    InvalidNameError,
    InvalidOptionError,
    NotFoundError,
    RegistryError,
    StoreLockedError,
)
from shimpy.names import ModelName
from shimpy.registry import blobs
from shimpy.registry.blobs import DigestMismatchError, hash_file
from shimpy.registry.manifest import Manifest, ManifestFile, Origin, parse_digest
from shimpy.registry.settings import ModelSettings, Turn
from shimpy.registry.store import Store
from tests.registry.storing import digest_of, manifest, put_blob

A, B = ModelName("a"), ModelName("b")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


def _silent(_file: str, _n_bytes: int, _total: int) -> None:
    pass


# --- ownership -------------------------------------------------------------------------------


def test_a_store_has_one_owner_who_is_named(root: Path) -> None:
    with Store(root):
        script = (
            "from pathlib import Path\nfrom shimpy.registry.store import Store\n"
            f"Store(Path({str(root)!r}))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
        )
        assert "StoreLockedError" in done.stderr
        assert f"process {os.getpid()}" in done.stderr
        assert str(root) in done.stderr
        with pytest.raises(StoreLockedError):
            Store(root)
    Store(root).close()


def test_an_owner_that_died_owns_nothing(root: Path) -> None:
    script = (
        "import os\nfrom pathlib import Path\nfrom shimpy.registry.store import Store\n"
        f"store = Store(Path({str(root)!r}))\nos._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 9
    Store(root).close()


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match="file"):
        Store(tmp_path / "file" / "store")


# --- models ----------------------------------------------------------------------------------


def test_all_of_a_manifest_outlives_a_restart(root: Path) -> None:
    wanted = Manifest(
        name="hf.co/org/repo",
        tag="q4_k_m",
        files=(
            ManifestFile(name="x-00001-of-00002.gguf", size_bytes=3, digest=digest_of(b"one")),
            ManifestFile(name="x-00002-of-00002.gguf", size_bytes=3, digest=digest_of(b"two")),
            ManifestFile(
                role="projector", name="mmproj.gguf", size_bytes=5, digest=digest_of(b"three")
            ),
        ),
        origin=Origin(kind="huggingface", location="org/repo", revision="abc"),
        settings=ModelSettings(
            parameters={"stop": ["</s>"], "temperature": 0.6},
            system="s",
            template="t",
            messages=(Turn("user", "x"),),
            license="MIT",
            cpu_moe=3,
            keep_alive_s=-1.0,
            aliases=("x:y",),
            notes="n",
        ),
        created_s=12.5,
    )
    with Store(root) as store:
        for data in (b"one", b"two", b"three"):
            put_blob(store, data)
        store.put_manifest(wanted)
        assert store.path_of(wanted.files[0]).read_bytes() == b"one"
    with Store(root) as store:
        assert store.manifests() == (wanted,)
        assert store.manifest(ModelName("hf.co/org/repo", "q4_k_m")) == wanted
    assert (root / "manifests" / "hf.co%org%repo" / "q4_k_m.json").exists()


def test_a_manifest_needs_its_files(root: Path) -> None:
    with Store(root) as store:
        with pytest.raises(RegistryError, match="is not there"):
            store.put_manifest(manifest("a", b"missing"))
        put_blob(store, b"data")
        short = ManifestFile(name="m.gguf", size_bytes=9, digest=digest_of(b"data"))
        with pytest.raises(RegistryError, match="has 4 bytes, and 9 were expected"):
            store.put_manifest(Manifest(name="a", files=(short,)))
        assert store.manifests() == ()


def test_a_file_is_kept_as_long_as_a_model_needs_it(root: Path) -> None:
    with Store(root) as store:
        put_blob(store, b"one")
        put_blob(store, b"both")
        store.put_manifest(manifest("a", b"one", b"both"))
        store.copy(A, B)
        store.put_manifest(manifest("a", b"both"))
        assert digest_of(b"one") in store.blobs
        assert store.remove(B) == len(b"one")
        assert digest_of(b"one") not in store.blobs
        assert store.remove(A) == len(b"both")
        assert list(store.blobs.stored()) == []
        with pytest.raises(NotFoundError, match="'a:latest' not found"):
            store.remove(A)
        with pytest.raises(NotFoundError):
            store.copy(A, B)


def test_a_copy_has_what_was_set_and_a_life_of_its_own(root: Path) -> None:
    with Store(root) as store:
        put_blob(store, b"x")
        store.put_manifest(manifest("a", b"x", settings=ModelSettings(parameters={"seed": 1})))
        store.put_settings(A, ModelSettings(system="s", aliases=("alias",)))
        store.put_settings(B, ModelSettings(system="of another b"))
        copied = store.copy(A, B)
        assert copied.settings == ModelSettings(parameters={"seed": 1}, system="s")
        assert store.settings(B).is_empty
        store.put_settings(A, ModelSettings())
        assert store.manifest(B) == copied
        assert not (root / "settings").joinpath("a").exists()


def test_files_elsewhere_are_named_but_not_owned(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "m.gguf"
    elsewhere.write_bytes(b"12345")
    with Store(root) as store:
        file = ManifestFile(name="m.gguf", size_bytes=5, path=str(elsewhere))
        store.put_manifest(Manifest(name="a", files=(file,)))
        (found,) = store.verify(A, on_bytes=_silent)
        assert found.problem is None
        store.remove(A)
    assert elsewhere.exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "a"}', b'{"version": 99}', b"\xff"])
def test_a_damaged_manifest_is_told_and_takes_no_blob_with_it(root: Path, content: bytes) -> None:
    with Store(root) as store:
        put_blob(store, b"x")
        store.put_manifest(manifest("a", b"x"))
        put_blob(store, b"y")
        store.put_manifest(manifest("b", b"y"))
    path = root / "manifests" / "a" / "latest.json"
    path.write_bytes(content)
    with Store(root) as store:
        assert [str(m.model_name) for m in store.manifests()] == ["b:latest"]
        assert "latest.json" in store.damaged[path]
        assert store.is_damaged(A)
        # What it needed is not known: nothing goes.
        store.remove(B)
        collected = store.gc(min_age_s=0.0)
        assert (collected.n_files, len(collected.problems)) == (0, 1)
        store.remove(A)
        assert store.gc(min_age_s=0.0).n_files == 2


def test_a_manifest_of_a_later_version_says_so(root: Path) -> None:
    with Store(root) as store:
        put_blob(store, b"x")
        store.put_manifest(manifest("a", b"x"))
    path = root / "manifests" / "a" / "latest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    if '"version": 2' not in path.read_text():
        path.write_text('{"version": 2,' + path.read_text().lstrip("{"))
    with Store(root) as store:
        assert "a newer shimpy made it" in store.damaged[path]


def test_a_name_too_long_for_the_disk_is_refused(root: Path) -> None:
    with Store(root) as store:
        put_blob(store, b"x")
        with pytest.raises(InvalidNameError, match="300 characters"):
            store.put_manifest(manifest("a" * 300, b"x"))


# --- blobs -----------------------------------------------------------------------------------


def test_what_is_written_is_checked(root: Path) -> None:
    with Store(root) as store:
        with store.blobs.begin(digest_of(b"right")) as writer:
            writer.write(b"wrong")
            with pytest.raises(DigestMismatchError, match=digest_of(b"wrong")):
                writer.commit()
        assert list(store.blobs.stored()) == []
        assert list(store.blobs.leftovers()) == []


def test_a_blob_has_one_writer(root: Path) -> None:
    with Store(root) as store:
        digest = digest_of(b"x")
        with store.blobs.begin(digest) as writer:
            writer.write(b"x")
            with pytest.raises(RegistryError, match="being written"):
                store.blobs.begin(digest)
        # The first has left: the second goes on.
        with store.blobs.begin(digest) as writer:
            writer.commit()
        assert store.blobs.size(digest) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 25), st.booleans())
def test_a_blob_is_written_in_whole_pieces_where_they_come_quickly(
    sizes: list[int], n_begun: int, is_quick: bool
) -> None:
    """Whatever comes at once, and however much an earlier writer left."""
    data = bytes(index % 251 for index in range(n_begun + sum(sizes)))
    times = itertools.count(step=0.9 if is_quick else 1.1)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(blobs, "_PIECE", 16),
        mock.patch.object(blobs.time, "monotonic", times.__next__),
        Store(Path(folder) / "store") as store,
    ):
        digest = digest_of(data)
        with store.blobs.begin(digest) as writer:
            writer.write(data[:n_begun])
        with store.blobs.begin(digest) as writer:
            assert writer.n_bytes == n_begun
            n_whole = 0
            for size in sizes:
                before = writer.n_bytes
                writer.write(data[before:][:size])
                n_whole += writer.n_bytes // 16 > before // 16
                # Of the first it is not known how quickly they come.
                waits = is_quick and n_whole > 1
                on_disk = writer.n_bytes // 16 * 16 if waits else writer.n_bytes
                assert store.blobs.begun_bytes(digest) == on_disk
            writer.commit()
        assert store.blobs.path(digest).read_bytes() == data


def test_a_restarted_writer_forgets_what_was(root: Path) -> None:
    with Store(root) as store:
        digest = digest_of(b"right")
        with store.blobs.begin(digest) as writer:
            writer.write(b"wrong!")
        with store.blobs.begin(digest) as writer:
            assert writer.n_bytes == 6
            writer.restart()
            writer.write(b"right")
            writer.commit()
        assert store.blobs.path(digest).read_bytes() == b"right"


def test_adopting_checks_moves_and_tells_how_far_it_is(root: Path) -> None:
    with Store(root) as store:
        folder = store.blobs.working_folder("org/repo:q4")
        assert folder == store.blobs.working_folder("org/repo:q4")
        assert folder != store.blobs.working_folder("org/repo/q4")
        (folder / "m.gguf").write_bytes(b"data")
        with pytest.raises(DigestMismatchError):
            store.blobs.adopt(folder / "m.gguf", digest_of(b"other"))
        told: list[int] = []
        assert store.blobs.adopt(folder / "m.gguf", on_bytes=told.append) == digest_of(b"data")
        assert told == [4]
        assert not (folder / "m.gguf").exists()
        (folder / "again.gguf").write_bytes(b"data")
        store.blobs.adopt(folder / "again.gguf", digest_of(b"data"), trusted=True)
        store.blobs.discard_working("org/repo:q4")
        assert not folder.exists()
        assert [file.digest for file in store.blobs.stored()] == [digest_of(b"data")]


def test_the_collector_leaves_what_is_pinned_or_young(root: Path) -> None:
    with Store(root) as store:
        put_blob(store, b"x")
        (store.blobs.working_folder("key") / "part").write_bytes(b"123")
        with store.pinned(digest_of(b"x"), "key"):
            assert store.gc(min_age_s=0.0).n_files == 0
            with store.pinned("key"):
                pass
            assert store.gc(min_age_s=0.0).n_files == 0
        young = store.gc()
        assert (young.n_files, young.n_kept, young.kept_bytes) == (0, 2, 4)
        old = store.gc(min_age_s=0.0)
        assert (old.n_files, old.freed_bytes, old.n_kept) == (2, 4, 0)


def test_the_collector_leaves_strangers_alone(root: Path) -> None:
    with Store(root) as store:
        put_blob(store, b"x")
        (store.blobs.folder / "notes.txt").write_text("mine")
        assert store.gc(min_age_s=0.0).n_files == 1
        assert (store.blobs.folder / "notes.txt").exists()


def test_verify_tells_what_is_wrong(root: Path) -> None:
    with Store(root) as store:
        for data in (b"good", b"changed", b"shorter", b"missing"):
            put_blob(store, data)
        store.put_manifest(manifest("a", b"good", b"changed", b"shorter", b"missing"))
        store.blobs.path(digest_of(b"changed")).write_bytes(b"CHANGED")
        store.blobs.path(digest_of(b"shorter")).write_bytes(b"short")
        store.blobs.path(digest_of(b"missing")).unlink()
        changed = digest_of(b"CHANGED")
        told: list[tuple[str, int, int]] = []
        found = store.verify(A, on_bytes=lambda *news: told.append(news))
        assert [one.problem and one.problem.partition(": ")[2] for one in found] == [
            None,
            f"is damaged: its digest is {changed}, and {digest_of(b'changed')} was expected",
            "has 5 bytes, and 7 were expected",
            "is not there: No such file or directory",
        ]
        assert told == [("m-0.gguf", 4, 4), ("m-1.gguf", 7, 7)]
        with pytest.raises(NotFoundError):
            store.verify(B, on_bytes=_silent)


def test_a_hash_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)

    def stop(_n_bytes: int) -> None:
        raise KeyError

    with pytest.raises(RegistryError):
        hash_file(tmp_path / "nowhere")
    with pytest.raises(KeyError):
        hash_file(tmp_path / "f", on_bytes=stop)


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "g" * 64, "../../etc/passwd", "x" * 71]
)
def test_what_is_no_digest_leads_nowhere(text: str) -> None:
    with pytest.raises(InvalidOptionError):
        parse_digest(text)


def test_both_forms_of_a_digest_are_one() -> None:
    assert parse_digest("sha256-" + "AB" * 32) == "sha256:" + "ab" * 32


# --- settings --------------------------------------------------------------------------------


def test_later_settings_win_one_by_one() -> None:
    lower = ModelSettings(parameters={"a": 1, "b": 2}, system="low", license="MIT", cpu_moe="on")
    upper = ModelSettings(parameters={"b": 3}, system="", keep_alive_s=0.0)
    assert upper.over(lower) == ModelSettings(
        parameters={"a": 1, "b": 3}, system="", license="MIT", cpu_moe="on", keep_alive_s=0.0
    )
    assert upper.over(ModelSettings()) == upper
    assert ModelSettings().over(lower) == lower


def test_settings_are_taken_back_by_name() -> None:
    settings = ModelSettings(parameters={"a": 1, "b": 2}, system="s", notes="n")
    assert settings.without("a", "system", "nothing") == ModelSettings(
        parameters={"b": 2}, notes="n"
    )
    assert settings.without("a", "b", "system", "notes").is_empty


def test_damaged_settings_are_told_and_others_stay(root: Path) -> None:
    with Store(root) as store:
        store.put_settings(A, ModelSettings(system="a"))
        store.put_settings(B, ModelSettings(system="b"))
    path = root / "settings" / "a" / "latest.json"
    path.write_text("nonsense")
    with Store(root) as store:
        assert store.settings(A).is_empty
        assert store.settings(B).system == "b"
        assert "settings can't be read" in store.damaged[path]
        store.put_settings(A, ModelSettings(system="new"))
        assert store.damaged == {}
        assert store.settings(A).system == "new"


# --- any order of things ---------------------------------------------------------------------

NAMES = st.sampled_from([A, B, ModelName("b", "q8_0"), ModelName("org/c")])
DATA = st.sampled_from([b"1", b"22", b"333", b"4444"])


class AnyOrder(RuleBasedStateMachine):
    """A store against two dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="store-"))
        self.store = Store(self.root)
        self.models: dict[ModelName, frozenset[bytes]] = {}
        self.set: dict[ModelName, ModelSettings] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    @rule(name=NAMES, data=st.frozensets(DATA, min_size=1))
    def put(self, name: ModelName, data: frozenset[bytes]) -> None:
        for blob in data:
            put_blob(self.store, blob)
        made = manifest(name.name, *sorted(data))
        self.store.put_manifest(Manifest(name=name.name, tag=name.tag, files=made.files))
        self.models[name] = data

    @rule(source=NAMES, copy=NAMES)
    def copy(self, source: ModelName, copy: ModelName) -> None:
        if source not in self.models:
            with pytest.raises(NotFoundError):
                self.store.copy(source, copy)
            return
        self.store.copy(source, copy)
        self.models[copy] = self.models[source]
        self.set.pop(copy, None)

    @rule(name=NAMES)
    def remove(self, name: ModelName) -> None:
        if name not in self.models:
            with pytest.raises(NotFoundError):
                self.store.remove(name)
            return
        self.store.remove(name)
        del self.models[name]
        self.set.pop(name, None)

    @rule(name=NAMES, system=st.sampled_from([None, "", "text"]))
    def put_settings(self, name: ModelName, system: str | None) -> None:
        self.store.put_settings(name, ModelSettings(system=system))
        self.set[name] = ModelSettings(system=system)

    @rule(data=DATA)
    def leave_a_blob(self, data: bytes) -> None:
        put_blob(self.store, data)

    @rule(data=DATA)
    def leave_a_part(self, data: bytes) -> None:
        if digest_of(data) not in self.store.blobs:
            with self.store.blobs.begin(digest_of(data)) as writer:
                writer.restart()
                writer.write(data[:1])

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.root)

    @rule()
    def collect(self) -> None:
        self.store.gc(min_age_s=0.0)
        needed = {digest_of(blob) for data in self.models.values() for blob in data}
        assert {file.digest for file in self.store.blobs.stored()} == needed
        assert list(self.store.blobs.leftovers()) == []

    @invariant()
    def all_is_there(self) -> None:
        for name, data in self.models.items():
            found = self.store.manifest(name)
            assert found is not None
            assert found.digests == {digest_of(blob) for blob in data}
            for file in found.files:
                assert self.store.path_of(file).stat().st_size == file.size_bytes
        assert len(self.store.manifests()) == len(self.models)
        for name, settings in self.set.items():
            assert self.store.settings(name) == settings


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(max_examples=25, stateful_step_count=20, deadline=None)
