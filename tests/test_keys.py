"""API keys: what is kept of them, and that a write is whole or nothing."""

from __future__ import annotations

import multiprocessing
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.errors import NotFoundError, RegistryError, UserError
from shimpy.keys import SCOPES, Key, KeyFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.json"


def test_a_key_is_found_by_its_secret_alone(path: Path) -> None:
    key, token = KeyFile(path).create("laptop", ["infer"])
    assert KeyFile(path).find(token) == key
    for wrong in ("", key.id, key.name, key.sha256, token[:-1], token + "x", "\udcff"):
        assert KeyFile(path).find(wrong) is None


def test_the_secret_is_kept_nowhere(path: Path) -> None:
    _, token = KeyFile(path).create("laptop", ["infer"])
    secret = token.removeprefix("shimpy-")
    assert len(secret) >= 43  # 256 bits in base64
    for file in path.parent.iterdir():
        assert secret not in file.read_text(encoding="utf-8")


def test_nobody_else_may_read_the_file(path: Path) -> None:
    KeyFile(path).create("laptop", ["infer"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_running_daemon_sees_what_others_write(path: Path) -> None:
    daemon, other = KeyFile(path), KeyFile(path)
    assert daemon.all() == ()
    key, token = other.create("laptop", ["infer"])
    assert daemon.find(token) == key
    other.revoke("laptop")
    assert daemon.find(token) is None


def test_revoke_takes_a_name_or_an_id(path: Path) -> None:
    file = KeyFile(path)
    first, _ = file.create("one", ["infer"])
    second, _ = file.create("two", ["infer"])
    assert file.revoke(first.id) == first
    assert file.revoke("two") == second
    with pytest.raises(NotFoundError, match="no key 'two'"):
        file.revoke("two")


def test_names_are_unique(path: Path) -> None:
    KeyFile(path).create("laptop", ["infer"])
    with pytest.raises(UserError, match="there is a key named 'laptop'"):
        KeyFile(path).create("laptop", ["admin"])


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"version": 2, "keys": []}', b"\xff"])
def test_a_damaged_file_is_an_error_and_stays(path: Path, data: bytes) -> None:
    """Taking it for empty would open the daemon to everybody."""
    path.parent.mkdir()
    path.write_bytes(data)
    for use in (KeyFile(path).all, lambda: KeyFile(path).create("a", ["infer"])):
        with pytest.raises(RegistryError, match="can't be read"):
            use()
    assert path.read_bytes() == data


def test_what_can_not_be_written_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KeyFile(path).create("old", ["infer"])
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(Exception, match="no room on the disk"):
        KeyFile(path).create("new", ["infer"])
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {"keys.json", "keys.lock"}


def _create(path: Path, name: str) -> None:
    KeyFile(path).create(name, ["infer"])


def test_two_writers_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_create, args=(path, f"key{n}")) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert {key.name for key in KeyFile(path).all()} == {"key0", "key1", "key2"}


@given(st.sets(st.sampled_from(SCOPES)))
def test_admin_may_do_everything(scopes: set[str]) -> None:
    key = Key(id="1", name="a", scopes=tuple(scopes), sha256="", created_s=0)  # type: ignore[arg-type]
    for scope in SCOPES:
        assert key.allows(scope) == (scope in scopes or "admin" in scopes)
