"""Operations on a store, by name, so that another process can be killed in the middle of one.

    python -m tests.registry.storing ROOT OPERATION N

carries out OPERATION on the store in ROOT and kills itself before the N-th step that changes
the disk. With N = 0 it prints the steps instead.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from shimpy.names import ModelName
from shimpy.registry.manifest import Manifest, ManifestFile
from shimpy.registry.settings import ModelSettings
from shimpy.registry.store import Store

OLD = b"old" * 1000
NEW = b"new" * 2000


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def manifest(name: str, *blobs: bytes, settings: ModelSettings | None = None) -> Manifest:
    """A model whose files are some blobs."""
    files = tuple(
        ManifestFile(name=f"m-{i}.gguf", size_bytes=len(data), digest=digest_of(data))
        for i, data in enumerate(blobs)
    )
    return Manifest(name=name, files=files, settings=settings or ModelSettings())


def put_blob(store: Store, data: bytes, *, resume: bool = True) -> str:
    digest = digest_of(data)
    if digest not in store.blobs:
        with store.blobs.begin(digest, resume=resume) as writer:
            rest = data[writer.n_bytes :]
            half = len(rest) // 2
            writer.write(rest[:half])
            writer.write(rest[half:])
            writer.commit()
    return digest


def prepare(root: Path) -> None:
    """A store with one model, "kept", and one that operations change, "changed"."""
    with Store(root) as store:
        put_blob(store, OLD)
        put_blob(store, b"shared")
        store.put_manifest(manifest("kept", b"shared"))
        store.put_manifest(manifest("changed", OLD, b"shared"))
        store.put_settings(ModelName("changed"), ModelSettings(system="old"))


def _install(store: Store) -> None:
    put_blob(store, NEW)
    store.put_manifest(manifest("new", NEW, b"shared"))


def _upload(store: Store) -> None:
    put_blob(store, NEW, resume=False)
    store.put_manifest(manifest("new", NEW))


def _adopt(store: Store) -> None:
    path = store.blobs.working_folder("new/model") / "m.gguf"
    path.write_bytes(NEW)
    digest = store.blobs.adopt(path, digest_of(NEW))
    store.put_manifest(manifest("new", NEW))
    assert digest == digest_of(NEW)
    store.blobs.discard_working("new/model")


def _replace(store: Store) -> None:
    put_blob(store, NEW)
    store.put_manifest(manifest("changed", NEW))


def _copy(store: Store) -> None:
    store.copy(ModelName("changed"), ModelName("new"))


def _remove(store: Store) -> None:
    store.remove(ModelName("changed"))


def _set(store: Store) -> None:
    store.put_settings(ModelName("changed"), ModelSettings(system="new"))


def _collect(store: Store) -> None:
    store.gc(min_age_s=0.0)


OPERATIONS: dict[str, Callable[[Store], None]] = {
    "install": _install,
    "upload": _upload,
    "adopt": _adopt,
    "replace": _replace,
    "copy": _copy,
    "remove": _remove,
    "set": _set,
    "collect": _collect,
}


class Countdown:
    """A hook that acts before the n-th step."""

    def __init__(self, n: int, act: Callable[[], None]) -> None:
        self.steps: list[str] = []
        self._n = n
        self._act = act

    def __call__(self, step: str) -> None:
        self.steps.append(step)
        if len(self.steps) == self._n:
            self._act()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(root: str, operation: str, n: str) -> None:
    """See the module."""
    hook = Countdown(int(n), _die)
    with Store(Path(root), hook=hook) as store:
        if operation == "collect":
            # Something to collect: an upload that no model came of.
            put_blob(store, NEW)
            hook.steps.clear()
        OPERATIONS[operation](store)
    sys.stdout.write("\n".join(hook.steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
