from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shimpy.errors import NotFoundError
from shimpy.names import parse_model_name
from shimpy.registry.model import Model
from shimpy.server import freshness
from shimpy.server.freshness import FreshRegistry


def _model(path: Path) -> Model:
    stat = path.stat()
    return Model(
        name=parse_model_name(path.stem),
        files=(path,),
        size_bytes=stat.st_size,
        modified_s=stat.st_mtime,
        digest=path.stem,
        source="",
        shape=None,
    )


@dataclass
class FolderScanner:
    """A registry of the files in a folder; a scan waits at the gate when there is one."""

    folder: Path
    gate: threading.Semaphore | None = None
    n_scans: int = 0
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    found: tuple[Model, ...] = ()
    problems: tuple[str, ...] = ()

    def refresh(self) -> None:
        found = tuple(_model(path) for path in sorted(self.folder.iterdir()))
        self.n_scans += 1
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=20)
        self.found = found

    def models(self) -> tuple[Model, ...]:
        return self.found

    def resolve(self, text: str) -> Model:
        for model in self.found:
            if model.name == parse_model_name(text):
                return model
        raise NotFoundError(text)


async def test_a_listing_sees_what_came_before_it(tmp_path: Path) -> None:
    registry = FreshRegistry(FolderScanner(tmp_path))
    assert await registry.models() == ()
    (tmp_path / "a").touch()
    assert [str(model.name) for model in await registry.models()] == ["a:latest"]


async def test_a_known_model_needs_no_scan(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    scanner = FolderScanner(tmp_path)
    registry = FreshRegistry(scanner)
    await registry.resolve("a")
    n_scans = scanner.n_scans
    for _ in range(5):
        await registry.resolve("a")
    assert scanner.n_scans == n_scans


async def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    registry = FreshRegistry(FolderScanner(tmp_path))
    await registry.resolve("a")
    (tmp_path / "a").write_bytes(b"more")
    assert (await registry.resolve("a")).size_bytes == 4
    (tmp_path / "a").unlink()
    with pytest.raises(NotFoundError):
        await registry.resolve("a")


@pytest.mark.parametrize("is_local", [True, False])
async def test_only_a_disk_of_this_machine_is_asked_without_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    (tmp_path / "a").touch()
    asked_in: list[threading.Thread] = []
    is_current = freshness._is_current

    def note(model: Model) -> bool:
        asked_in.append(threading.current_thread())
        return is_current(model)

    monkeypatch.setattr(freshness, "_is_current", note)
    monkeypatch.setattr(freshness, "are_local", lambda _: is_local)
    registry = FreshRegistry(FolderScanner(tmp_path))
    await registry.scan()
    await registry.resolve("a")
    await registry.resolve("a")
    await registry.scan()
    await registry.resolve("a")
    ours = [thread is threading.main_thread() for thread in asked_in]
    # The first look after each scan finds out.
    assert ours == [False, is_local, False]


async def test_requests_at_once_share_scans(tmp_path: Path) -> None:
    """All that come while a scan runs are served by the next one, together."""
    scanner = FolderScanner(tmp_path, gate=threading.Semaphore(0))
    registry = FreshRegistry(scanner)
    first = asyncio.ensure_future(registry.models())
    await asyncio.to_thread(scanner.entered.acquire)
    (tmp_path / "a").touch()
    others = [asyncio.ensure_future(registry.models()) for _ in range(20)]
    assert scanner.gate is not None
    scanner.gate.release(2)
    assert await first == ()
    for listed in await asyncio.gather(*others):
        assert [str(model.name) for model in listed] == ["a:latest"]
    assert scanner.n_scans == 2


async def test_a_caller_that_leaves_does_not_take_the_scan_along(tmp_path: Path) -> None:
    scanner = FolderScanner(tmp_path, gate=threading.Semaphore(0))
    registry = FreshRegistry(scanner)
    leaving = asyncio.ensure_future(registry.scan())
    await asyncio.to_thread(scanner.entered.acquire)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    staying = asyncio.ensure_future(registry.scan())
    assert scanner.gate is not None
    scanner.gate.release(2)
    await staying
    assert scanner.n_scans == 2


async def test_slow_scans_are_not_repeated_for_each_request(tmp_path: Path) -> None:
    now_s = 0.0
    scanner = FolderScanner(tmp_path)
    registry = FreshRegistry(scanner, clock=lambda: now_s)
    slow = FolderScanner.refresh

    def refresh() -> None:
        nonlocal now_s
        slow(scanner)
        now_s += 1.0

    scanner.refresh = refresh  # type: ignore[method-assign]
    await registry.models()
    await registry.models()
    assert scanner.n_scans == 1
    now_s += 5.0
    await registry.models()
    assert scanner.n_scans == 2


async def test_a_problem_is_told_once_as_long_as_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(freshness._log, "info", lambda _event, reason: told.append(reason))
    scanner = FolderScanner(tmp_path)
    registry = FreshRegistry(scanner)
    for problems in ((), ("a",), ("a", "b"), ("b",), ("a", "b")):
        scanner.problems = problems
        await registry.scan()
        assert registry.problems == problems
    assert told == ["a", "b", "a"]
