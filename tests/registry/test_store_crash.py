"""Whatever step the process dies before, or the disk is full at, the store stays whole."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shimpy.errors import DiskFullError
from shimpy.names import ModelName
from shimpy.registry.settings import ModelSettings
from shimpy.registry.store import Store
from tests.registry.storing import NEW, OLD, OPERATIONS, Countdown, digest_of, prepare, put_blob

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared") / "store"
    prepare(root)
    return root


def _run(root: Path, operation: str, n: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.registry.storing", str(root), operation, str(n)],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def _nothing(_file: str, _n_bytes: int, _total: int) -> None:
    pass


def _check_whole(root: Path) -> dict[str, int]:
    """Open a store again: every model that is listed is whole; nothing else stays for good."""
    with Store(root) as store:
        assert store.damaged == {}
        models = store.manifests()
        for model in models:
            found = store.verify(model.model_name, on_bytes=_nothing)
            assert [one.problem for one in found] == [None] * len(model.files)
        assert store.manifest(ModelName("kept")) is not None
        assert store.settings(ModelName("changed")).system in ("old", "new", None)
        store.gc(min_age_s=0.0)
        needed = {digest for model in models for digest in model.digests}
        assert {file.digest for file in store.blobs.stored()} == needed
        assert list(store.blobs.leftovers()) == []
        temporary = [path for path in root.rglob("*") if ".tmp" in path.name]
        assert temporary == []
        return {model.name: len(model.files) for model in models}


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_is_whole_after_a_kill_before_any_step(
    operation: str, prepared: Path, tmp_path: Path
) -> None:
    """And the same again succeeds after it."""
    shutil.copytree(prepared, tmp_path / "probe")
    probe = _run(tmp_path / "probe", operation, 0)
    assert probe.returncode == 0, probe.stderr
    steps = probe.stdout.split("\n")
    outcome = _check_whole(tmp_path / "probe")
    for n in range(1, len(steps) + 1):
        root = tmp_path / str(n)
        shutil.copytree(prepared, root)
        killed = _run(root, operation, n)
        assert killed.returncode == -9, (n, steps[n - 1], killed.stderr)
        models = _check_whole(root)
        # Nothing between what was and what is to be.
        before = {"kept": 1, "changed": 2}
        assert models in (before, outcome), (n, steps[n - 1])
        if not (operation == "remove" and models == outcome):
            with Store(root) as store:
                OPERATIONS[operation](store)
        assert _check_whole(root) == outcome


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"collect"}))
def test_a_full_disk_loses_nothing(operation: str, prepared: Path, tmp_path: Path) -> None:
    n = 0
    while True:
        n += 1
        root = tmp_path / str(n)
        shutil.copytree(prepared, root)

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        hook = Countdown(n, full)
        with Store(root, hook=hook) as store:
            told = _disk_full_at(store, operation)
            assert told is None or ("no room" in told and str(root) in told)
            # What memory says is what the disk says.
            models, settings = store.manifests(), store.settings(ModelName("changed"))
        with Store(root) as store:
            assert store.manifests() == models
            assert store.settings(ModelName("changed")) == settings
        _check_whole(root)
        if n > len(hook.steps):
            break
    assert n > 2


def _disk_full_at(store: Store, operation: str) -> str | None:
    try:
        OPERATIONS[operation](store)
    except DiskFullError as error:
        return error.message
    return None


def test_a_real_full_disk_is_told_and_what_came_is_kept(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk's: the same errors, without a mount."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from shimpy.errors import DiskFullError\n"
        "from shimpy.registry.store import Store\n"
        "from tests.registry.storing import digest_of\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "data = b'x' * 3_000_000\n"
        "with Store(Path(sys.argv[1])) as store:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, -1))\n"
        "    writer = store.blobs.begin(digest_of(data))\n"
        "    writer.write(data[:1_500_000])\n"
        "    try:\n"
        "        writer.write(data[1_500_000:])\n"
        "    except DiskFullError as error:\n"
        "        print(error.message)\n"
        "    print(writer.n_bytes, writer._path.stat().st_size)\n"
        "    writer.close()\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "    with store.blobs.begin(digest_of(data)) as writer:\n"
        "        print(writer.n_bytes)\n"
        "        writer.write(data[writer.n_bytes:])\n"
        "        writer.commit()\n"
        "    print(digest_of(data) in store.blobs)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, *rest = done.stdout.splitlines()
    assert "no room" in told
    assert rest == ["1500000 1500000", "1500000", "True"]


def test_each_file_is_synced_before_it_gets_its_name(prepared: Path, tmp_path: Path) -> None:
    """After a power cut a name must not stand for data that never reached the disk."""
    root = tmp_path / "store"
    shutil.copytree(prepared, root)
    hook = Countdown(0, lambda: None)
    with Store(root, hook=hook) as store:
        OPERATIONS["install"](store)
    assert hook.steps == [
        "blob: write", "blob: write", "blob: sync", "blob: rename", "blob: sync folder",
        "manifest: create", "manifest: write", "manifest: sync", "manifest: rename",
        "manifest: sync folder",
    ]  # fmt: skip


def test_a_part_of_a_blob_outlives_the_process(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(prepared, root)
    assert _run(root, "install", 2).returncode == -9
    with Store(root) as store:
        (part,) = store.blobs.leftovers()
        assert (part.digest, part.size_bytes) == (digest_of(NEW), len(NEW) // 2)
        # Young: somebody may go on with it.
        assert store.gc().n_kept == 1
        with store.blobs.begin(digest_of(NEW)) as writer:
            assert writer.n_bytes == len(NEW) // 2
            # In use: not collected, however old.
            assert store.gc(min_age_s=0.0).n_files == 0
        put_blob(store, NEW)
        assert store.blobs.path(digest_of(NEW)).read_bytes() == NEW


def test_settings_die_before_their_model(prepared: Path, tmp_path: Path) -> None:
    """Else another model of that name would come up with them."""
    root = tmp_path / "store"
    shutil.copytree(prepared, root)
    hook = Countdown(0, lambda: None)
    with Store(root, hook=hook) as store:
        store.remove(ModelName("changed"))
        store.put_manifest(store.manifests()[0])
        assert store.settings(ModelName("changed")) == ModelSettings()
        assert digest_of(OLD) not in store.blobs
    assert hook.steps[:3] == ["settings: unlink", "settings: sync folder", "manifest: unlink"]
