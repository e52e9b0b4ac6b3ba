"""The folder of saved prefixes, with a model that takes nothing amiss silently."""

from __future__ import annotations

import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from msgspec.structs import replace

from shimpy.engine import prefix_store
from shimpy.engine.prefix_store import PrefixStore, prefix_key
from shimpy.protocol.messages import Cancel, Done, PrefixNews, Sampling, Shutdown, Text
from tests.engine.harness import Rig, load_of
from tests.engine.worker import TIMEOUT_S, Worker
from tests.fake_backend import FakeBackend

STEM = "You are a fox, and the fox is at the end of the story. " * 10
SHAPE = {"n_ctx": 2048, "n_slots": 2, "n_batch": 512}


def life(folder: Path, text: str = STEM, **shape: Any) -> tuple[Done, list[PrefixNews]]:
    """Load the model, ask once, check the answer, and unload it."""
    rig = Rig(FakeBackend(**SHAPE, **shape), prefixes=folder)
    rig.submit(1, [Text(text)], n_predict=20, sampling=Sampling(seed=7))
    rig.finish()
    rig.end()
    told = rig.told[1]
    reference = Rig(FakeBackend(**SHAPE, **shape))
    reference.submit(1, [Text(text)], n_predict=20, sampling=Sampling(seed=7))
    reference.finish()
    assert told.text == reference.told[1].text
    return told.done, rig.news


def kinds(news: list[PrefixNews]) -> list[str]:
    return [one.kind for one in news]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def test_a_prompt_is_not_computed_again_after_a_reload(tmp_path: Path) -> None:
    first, news = life(tmp_path)
    assert (first.n_cached, kinds(news)) == (0, ["saved"])
    again, news = life(tmp_path)
    assert (again.n_cached, kinds(news)) == (first.n_prompt - 1, ["restored"])
    longer, news = life(tmp_path, STEM + "And then? " * 20)
    assert longer.n_cached >= first.n_prompt - 1
    assert kinds(news) == ["restored", "saved"]
    assert news[0].n_tokens == first.n_prompt + first.n_generated - 1
    assert news[0].n_bytes == 4 * 2 * news[0].n_tokens + 68


@pytest.mark.parametrize("shape", [{"has_window": True}, {"can_split": False, "can_shift": False}])
def test_a_state_that_is_whole_goes_on_from_its_end(tmp_path: Path, shape: dict[str, bool]) -> None:
    first, _ = life(tmp_path, **shape)
    if shape.get("has_window"):
        again, news = life(tmp_path, **shape)
        assert (again.n_cached, kinds(news)) == (first.n_prompt - 1, ["restored"])
    shorter, news = life(tmp_path, STEM[:400], **shape)
    assert (shorter.n_cached, kinds(news)) == (0, ["saved"])


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_a_window_that_was_restored_is_never_cut(tmp_path: Path, n_steps: int) -> None:
    """Also where its prompt was given up before anything was computed, and all is saved again."""
    first, _ = life(tmp_path, has_window=True)
    rig = Rig(FakeBackend(**SHAPE, has_window=True), prefixes=tmp_path)
    rig.submit(1, [Text(STEM)], n_predict=20)
    rig.step(n_steps)
    rig.send(Cancel(1))
    rig.end()
    assert kinds(rig.news) == ["restored"]
    again, news = life(tmp_path, has_window=True)
    assert (again.n_cached, kinds(news)) == (first.n_prompt - 1, ["restored"])


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "prefixes"
    life(folder)
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_damaged_file_costs_a_prefix_and_no_request(tmp_path: Path) -> None:
    """Cut or altered at random places; test_prefix_file.py tries them all."""
    draw = random.Random(5)
    life(tmp_path)
    [path] = files(tmp_path)
    good = path.read_bytes()
    for _ in range(12):
        data = bytearray(good)
        if draw.random() < 0.5:
            del data[draw.randrange(len(data)) :]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        done, news = life(tmp_path)
        assert done.n_cached == 0
        assert kinds(news) == ["discarded", "saved"]
        assert str(path) in news[0].reason
        assert path.read_bytes() == good


def test_what_is_no_file_of_ours_is_let_alone(tmp_path: Path) -> None:
    life(tmp_path)
    [path] = files(tmp_path)
    (path.parent / "notes.txt").write_text("mine")
    (path.parent / f"{path.name[:33]}x.kv").mkdir()
    (path.parent / f"{path.name[:33]}y.kv").symlink_to("/etc/passwd")
    os.mkfifo(path.parent / f"{path.name[:33]}z.kv")
    done, news = life(tmp_path)
    assert (done.n_cached, kinds(news)) == (done.n_prompt - 1, ["restored"])
    assert len(list(path.parent.iterdir())) == 5


def test_what_llama_cpp_does_not_take_is_removed(tmp_path: Path) -> None:
    life(tmp_path)
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path)
    rig.backend.fails_to_load = True
    rig.submit(1, [Text(STEM)], n_predict=2)
    rig.finish()
    assert rig.told[1].done.n_cached == 0
    assert kinds(rig.news) == ["discarded"]
    assert files(tmp_path) == []


def test_a_file_that_was_removed_meanwhile_is_forgotten(tmp_path: Path) -> None:
    life(tmp_path)
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path)
    shutil.rmtree(tmp_path)
    rig.submit(1, [Text(STEM)], n_predict=2)
    rig.finish()
    assert (rig.told[1].done.n_cached, rig.news) == (0, [])
    rig.end()
    assert kinds(rig.news) == ["saved"]


def test_a_state_that_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path)
    rig.backend.fails_to_save = True
    rig.submit(1, [Text(STEM)], n_predict=2)
    rig.finish()
    rig.end()
    assert kinds(rig.news) == ["skipped"]
    assert files(tmp_path) == []


def test_a_folder_that_can_t_be_made_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done, news = life(tmp_path / "file" / "prefixes")
    assert (done.reason, kinds(news)) == ("length", ["skipped"])


def other(folder: Path, digest: str, text: str, limit: int = 1 << 30) -> list[PrefixNews]:
    """Save a prompt of another model."""
    news: list[PrefixNews] = []
    backend = FakeBackend(**SHAPE)
    store = PrefixStore(load_of(folder, digest=digest, limit=limit), backend, send=news.append)
    rig = Rig(backend, prefixes=store)
    rig.submit(1, [Text(text)], n_predict=2)
    rig.finish()
    rig.end()
    return news


def test_all_models_share_one_bound_and_the_oldest_go(tmp_path: Path) -> None:
    [one] = other(tmp_path, "a" * 64, STEM)
    limit = 2 * one.n_bytes + 100
    [first] = files(tmp_path)
    other(tmp_path, "b" * 64, STEM, limit)
    assert len(files(tmp_path)) == 2
    os.utime(first, (1, 1))
    assert kinds(other(tmp_path, "c" * 64, STEM, limit)) == ["saved"]
    assert {path.parent.name[0] for path in files(tmp_path)} == {"b", "c"}
    assert kinds(other(tmp_path, "d" * 64, STEM, one.n_bytes - 100)) == ["skipped"]
    assert {path.parent.name[0] for path in files(tmp_path)} == {"b", "c"}


def test_the_disk_s_last_bytes_are_not_taken(tmp_path: Path) -> None:
    life(tmp_path)
    with mock.patch.object(prefix_store, "MIN_FREE_BYTES", 1 << 60):
        _, news = life(tmp_path, "Another text: " + STEM)
    assert kinds(news) == ["skipped"]
    assert "room" in news[0].reason
    assert len(files(tmp_path)) == 1


def test_what_a_dead_worker_left_unfinished_is_removed(tmp_path: Path) -> None:
    life(tmp_path)
    [path] = files(tmp_path)
    (path.parent / (path.name + ".part")).write_bytes(b"half")
    (tmp_path / ("e" * 32)).mkdir()
    (tmp_path / ("e" * 32) / "x.kv.part").write_bytes(b"half")
    life(tmp_path, "Another text: " + STEM)
    assert [file.suffix for file in files(tmp_path)] == [".kv", ".kv"]


def test_no_time_no_saving(tmp_path: Path) -> None:
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path)
    rig.submit(1, [Text(STEM)], n_predict=20)
    rig.finish()
    rig.end(save_s=0.0)
    assert kinds(rig.news) == ["skipped"]
    assert files(tmp_path) == []


def test_the_most_recent_prompts_are_saved_first(tmp_path: Path) -> None:
    rig = Rig(FakeBackend(**SHAPE), prefixes=tmp_path)
    for request, start in enumerate(["first ", "second "]):
        rig.submit(request, [Text(start + STEM)], n_predict=2)
        rig.finish()
    rig.end()
    n_tokens = [len(f"{start}{STEM}") for start in ("second ", "first ")]
    assert [news.n_tokens - n for news, n in zip(rig.news, n_tokens, strict=True)] == [2, 2]
    by_time = sorted(files(tmp_path), key=lambda path: path.stat().st_mtime)
    assert by_time[0].stat().st_size < by_time[1].stat().st_size


def test_a_model_s_files_as_they_are_make_the_key(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x" * 100)
    load = load_of(tmp_path)
    keys = set()
    for digest, path, state_key in (("a", model, "k"), ("b", model, "k"), ("a", model, "l")):
        keys.add(prefix_key(replace(load, digest=digest, path=str(path)), state_key))
    os.utime(model, ns=(1, 1))
    keys.add(prefix_key(replace(load, digest="a", path=str(model)), "k"))
    model.write_bytes(b"x" * 101)
    os.utime(model, ns=(1, 1))
    keys.add(prefix_key(replace(load, digest="a", path=str(model)), "k"))
    assert len(keys) == 5
    assert prefix_key(replace(load, digest="a", path=str(model)), "k") in keys


def test_a_disk_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """The process ends in the middle of writing, and leaves nothing half done."""
    model, folder = tmp_path / "stuck-save", tmp_path / "prefixes"
    model.touch()
    options = {"prefix_dir": str(folder), "prefix_cache_bytes": 1 << 30, "digest": "d" * 64}
    with Worker.start(module="tests.engine.fake_worker") as worker:
        worker.load(model, **SHAPE, **options)
        worker.generate(1, STEM, n_predict=2)
        worker.send(Shutdown(save_s=0.1))
        worker.wait_for_line("stuck")
        assert worker.process.wait(TIMEOUT_S) == 0
    assert files(folder) == []
