"""What of a worker's RAM is still to be taken, by what its process took."""

from __future__ import annotations

from pathlib import Path

import pytest

from shimpy.engine import untouched as untouched_module
from shimpy.engine.untouched import Untouched
from shimpy.units import MIB


@pytest.fixture
def statm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "statm"
    monkeypatch.setattr(untouched_module, "_STATM", file)
    monkeypatch.setattr(untouched_module.mmap, "PAGESIZE", MIB)
    return file


def test_it_gets_less_as_the_process_takes_more(statm: Path) -> None:
    """Pages of files, which "shared" counts, are none of it."""
    statm.write_text("900 100 30 1 0 90 0\n")
    untouched = Untouched(200 * MIB)
    told = []
    for resident, shared in [(100, 30), (110, 30), (150, 60), (200, 30), (300, 30), (80, 30)]:
        statm.write_text(f"900 {resident} {shared} 1 0 90 0\n")
        told.append(untouched.n_bytes // MIB)
    # In steps of 16 MiB, rounded up.
    assert told == [208, 192, 192, 112, 0, 208]


def test_where_all_was_taken_at_once_nothing_is_looked_at(statm: Path) -> None:
    assert not statm.exists()
    assert Untouched(0).n_bytes == 0
