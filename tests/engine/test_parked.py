"""States in RAM: who makes way, what fails, and what becomes of them as the model is unloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from shimpy.engine import parked
from shimpy.engine.parked import MIN_FREE_BYTES, ParkedPrefixes, available_bytes, can_park
from shimpy.engine.prefixes import SavedPrefix, SavedPrefixes
from shimpy.protocol.messages import Sampling, Text
from tests.engine.harness import Rig
from tests.engine.test_prefix_store import SHAPE, STEM, files, kinds
from tests.fake_backend import FakeBackend

STATE_BYTES = 4


class Ram:
    """A store over a fake model whose slot 0 holds what is parked next."""

    def __init__(self, limit: int = 1 << 20, available: int = 1 << 40) -> None:
        self.backend = FakeBackend(n_ctx=512)
        self.saved = SavedPrefixes(whole=False)
        self.available = available
        self.store = ParkedPrefixes(
            self.backend, self.saved, limit=limit, available=lambda: self.available
        )

    def park(self, first: int, n: int = 10) -> bool:
        tokens = [first] * n
        self.backend._add(0, 0, tokens)
        try:
            return self.store.park(0, tokens)
        finally:
            self.backend.kv_remove(0, 0, -1)

    def restore(self, prefix: SavedPrefix) -> list[int]:
        assert self.store.restore(prefix, 1)
        content = self.backend.content(1)
        self.backend.kv_remove(1, 0, -1)
        return content

    @property
    def firsts(self) -> list[int]:
        return [prefix.tokens[0] for prefix in self.saved]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_was_parked_comes_back_again_and_again() -> None:
    ram = Ram()
    assert ram.park(7)
    assert ram.park(8)
    [seven, eight] = ram.saved
    for _ in range(2):
        assert ram.restore(seven) == [7] * 10
        assert ram.restore(eight) == [8] * 10
    assert ram.store.n_bytes == 2 * 10 * STATE_BYTES


def test_those_used_longest_ago_make_way() -> None:
    ram = Ram(limit=3 * 10 * STATE_BYTES)
    for first in (1, 2, 3):
        assert ram.park(first)
    ram.restore(next(iter(ram.saved)))
    assert ram.park(4)
    assert ram.firsts == [3, 1, 4]
    assert not ram.park(5, 31)
    assert ram.firsts == [3, 1, 4]


def test_little_ram_is_left_to_others() -> None:
    ram = Ram(available=MIN_FREE_BYTES + 20 * STATE_BYTES)
    assert ram.park(1)
    ram.available = MIN_FREE_BYTES
    assert ram.park(2)
    assert ram.firsts == [2]
    ram.available = 0
    assert not ram.park(3)
    assert not Ram(limit=0).park(1)


def test_a_lower_limit_holds_at_once() -> None:
    ram = Ram()
    for first in (1, 2, 3):
        assert ram.park(first)
    ram.restore(next(iter(ram.saved)))
    n_before = open_files()
    ram.store.set_limit(2 * 10 * STATE_BYTES - 1)
    assert ram.firsts == [1]
    assert open_files() == n_before - 2
    assert ram.park(4)
    assert ram.firsts == [4]
    ram.store.set_limit(2 * 10 * STATE_BYTES)
    assert ram.park(5)
    assert ram.firsts == [4, 5]


def test_their_number_is_bounded_and_none_leaves_a_file_open() -> None:
    n_before = open_files()
    ram = Ram()
    with mock.patch.object(parked, "_MAX_PARKED", 3):
        for first in range(9):
            assert ram.park(first)
    assert ram.firsts == [6, 7, 8]
    ram.backend.fails_to_save = True
    assert not ram.park(9)
    assert open_files() == n_before + 3
    ram.store.close()
    assert (open_files(), len(ram.saved), ram.store.n_bytes) == (n_before, 0, 0)


def test_what_llama_cpp_does_not_take_is_forgotten() -> None:
    ram = Ram()
    ram.park(1)
    ram.backend.fails_to_load = True
    assert not ram.store.restore(next(iter(ram.saved)), 1)
    assert len(ram.saved) == 0


def test_a_system_that_refuses_files_in_ram_parks_nothing() -> None:
    with mock.patch.object(os, "memfd_create", side_effect=OSError):
        assert not Ram().park(1)


def test_the_kernel_tells_what_is_available() -> None:
    assert can_park()
    assert 0 < available_bytes() < 1 << 50
    with mock.patch.object(parked.Path, "open", side_effect=OSError):
        assert available_bytes() == 0


def test_room_for_its_files_is_made_at_once() -> None:
    """FDSize is the size of the kernel's table."""
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from shimpy.engine.parked import reserve_files\n"
        "before = os.listdir('/proc/self/fd')\n"
        "reserve_files()\n"
        "assert os.listdir('/proc/self/fd') == before\n"
        "print(Path('/proc/self/status').read_text())\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = next(line for line in told.stdout.splitlines() if line.startswith("FDSize:"))
    assert int(size.split()[1]) > 2 * parked._MAX_PARKED


# --- as the model is unloaded ---


def answer(rig: Rig, request: int, text: str) -> int:
    rig.submit(request, [Text(text)], n_predict=2, sampling=Sampling(seed=7))
    rig.finish()
    rig.rest()
    return rig.told[request].done.n_cached


def test_parked_prompts_are_saved_too_the_newest_first(tmp_path: Path) -> None:
    """Once each, whether their slot still has them or not."""
    texts = [f"{name} {STEM}" + "." * i for i, name in enumerate("abcd")]
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path, parked_bytes=1 << 20)
    for request, text in enumerate(texts):
        answer(rig, request, text)
    answer(rig, 9, texts[0])
    rig.end()
    assert kinds(rig.news) == ["saved"] * 4
    assert [news.n_tokens for news in rig.news] == [len(texts[i]) + 2 for i in (0, 3, 2, 1)]
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path, parked_bytes=1 << 20)
    for request, text in enumerate(texts):
        assert answer(rig, request, text) == len(text)
    rig.end()
    assert kinds(rig.news) == ["restored"] * 4
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("shape", [{"has_window": True}, {"can_split": False, "can_shift": False}])
def test_states_that_are_whole_are_saved_too(tmp_path: Path, shape: dict[str, bool]) -> None:
    texts = [f"{name} {STEM}" for name in "abc"]
    for life in range(2):
        rig = Rig(FakeBackend(**SHAPE, **shape), prefixes=tmp_path, parked_bytes=1 << 20)
        for request, text in enumerate(texts):
            n_cached = answer(rig, request, text + " Go on." * life)
            # The start token is the same in all of them.
            assert n_cached == len(text) if life and "has_window" in shape else n_cached <= 1
        rig.end()
    assert kinds(rig.news).count("saved") == 3


def test_what_can_t_be_written_costs_no_other(tmp_path: Path) -> None:
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path, parked_bytes=1 << 20)
    for request, name in enumerate("abc"):
        answer(rig, request, f"{name} {STEM}")
    send, calls = os.sendfile, iter(["full", "cut"])

    def fail(*args: int) -> int:
        match next(calls, None):
            case "full":
                raise OSError("no room")
            case "cut":
                return 0
        return send(*args)

    with mock.patch.object(os, "sendfile", fail):
        rig.end()
    assert kinds(rig.news) == ["skipped", "skipped", "saved"]
    assert len(files(tmp_path)) == 1
