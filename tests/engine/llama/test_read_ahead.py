"""A file that is not in the page cache is read before it is mapped: told, and stopped."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from shimpy.engine.llama import open_backend, read_ahead
from shimpy.errors import LoadError
from shimpy.protocol.messages import Load
from shimpy.units import KIB, MIB


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a file of 8 MiB in 8 pieces, as one of 512 MiB."""
    monkeypatch.setattr(read_ahead, "_PIECE_BYTES", MIB)
    monkeypatch.setattr(read_ahead, "_LEAST_BYTES", MIB)


def answering(monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
    """Have the kernel say of each page that is not to be waited for whether it is there."""

    def preadv(_file: int, buffers: Iterable[Any], _at: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        if error is not None:
            raise error
        return 1

    monkeypatch.setattr(os, "preadv", preadv)


COLD = BlockingIOError(errno.EAGAIN, "")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB + 5))
    return path


def test_what_was_just_written_is_not_cold(file: Path) -> None:
    assert not read_ahead.is_cold(str(file))


def test_what_left_the_page_cache_is_cold(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(opened.fileno(), [bytearray(1)], 4 * MIB, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            pytest.skip("this file system does not tell")
        else:
            pytest.skip("this file system keeps what it is told to drop")
    assert read_ahead.is_cold(str(file))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(COLD, True), (OSError(errno.EOPNOTSUPP, ""), False), (None, False)],
    ids=["not-there", "does-not-tell", "there"],
)
def test_the_kernel_is_asked(
    error: OSError | None, expected: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, error)
    assert read_ahead.is_cold(str(file)) == expected


@pytest.mark.usefixtures("small_pieces")
def test_files_are_read_in_pieces_and_told_as_one(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, COLD)
    other = tmp_path / "other"
    other.write_bytes(bytes(2 * MIB))
    told: list[float] = []
    paths = [str(file), str(tmp_path / "none"), str(other)]
    assert read_ahead.read_ahead(paths, lambda part: told.append(part) or True)
    assert told[0] == 0
    assert len(told) == 9 + 2
    assert told == sorted(told)
    assert told[9] == pytest.approx(0.8, abs=0.01)


@pytest.mark.usefixtures("small_pieces")
def test_it_can_be_stopped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, COLD)
    told: list[float] = []
    assert not read_ahead.read_ahead([str(file)], lambda part: told.append(part) or part < 0.5)
    assert 0.5 <= told[-1] < 0.7


@pytest.mark.usefixtures("small_pieces")
def test_what_is_read_is_huge_pages_where_the_file_system_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    with path.open("wb", buffering=0) as written:
        # So small that the page cache has no huge page of them.
        for _ in range(8 * MIB // 4096):
            written.write(os.urandom(4096))
        os.fsync(written.fileno())
    assert mapped_huge_bytes(path) == 0
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    if not read_ahead.is_cold(str(path)):
        pytest.skip("this file system keeps what it is told to drop, or does not tell")
    assert read_ahead.read_ahead([str(path)], lambda _: True)
    if not (n_bytes := mapped_huge_bytes(path)):
        pytest.skip("this file system has no huge pages")
    # But for what lies around the page that was looked at.
    assert n_bytes >= 4 * MIB


def mapped_huge_bytes(path: Path) -> int:
    """Return how much of a mapping of a file is huge pages."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        mapping.madvise(read_ahead._MADV_POPULATE_READ)
        regions = Path("/proc/self/smaps").read_text().split("VmFlags")
    mine = "".join(region for region in regions if str(path) in region)
    return sum(KIB * int(n) for n in re.findall(r"FilePmdMapped:\s+(\d+) kB", mine))


def test_an_old_kernel_changes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, COLD)
    monkeypatch.setattr(read_ahead, "_LEAST_BYTES", MIB)
    # No kernel knows it.
    monkeypatch.setattr(read_ahead, "_MADV_POPULATE_READ", 12345)
    told: list[float] = []
    assert read_ahead.read_ahead([str(file)], lambda part: told.append(part) or True)
    assert told == []


@pytest.fixture
def cold_model(llama_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose file has to be read from the disk, in many pieces."""
    answering(monkeypatch, COLD)
    piece = llama_model.stat().st_size // 50 // 4096 * 4096
    monkeypatch.setattr(read_ahead, "_PIECE_BYTES", max(4096, piece))
    monkeypatch.setattr(read_ahead, "_LEAST_BYTES", 1)
    return llama_model


def test_a_load_tells_of_what_is_read(cold_model: Path) -> None:
    told: list[float] = []
    backend = open_backend(Load(path=str(cold_model), n_ctx=256), on_progress=told.append)
    backend.close()
    assert told == sorted(told)
    assert len([part for part in told if part < 0.9]) > 20
    assert told[-1] == 1


def test_a_load_is_cancelled_while_it_is_read(cold_model: Path) -> None:
    with pytest.raises(LoadError, match="was cancelled"):
        open_backend(Load(path=str(cold_model), n_ctx=256), on_progress=lambda part: part < 0.4)
