"""`shimpy keys`: the life of a key at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shimpy.cli.keys import command
from shimpy.errors import NotFoundError
from shimpy.keys import KeyFile


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIMPY_HOME", str(tmp_path))
    return tmp_path


def keys(*args: str) -> Result:
    return CliRunner().invoke(command, args, catch_exceptions=False, standalone_mode=False)


def test_only_the_secret_is_on_stdout(home: Path) -> None:
    """So that `export SHIMPY_API_KEY=$(shimpy keys create me)` works."""
    token = keys("create", "me").stdout.strip()
    found = KeyFile(home / "state" / "keys.json").find(token)
    assert found is not None
    assert found.scopes == ("infer",)


def test_scopes_add_up(home: Path) -> None:
    made = json.loads(
        keys("create", "me", "--scope", "manage", "--scope", "infer", "--json").stdout
    )
    assert made["scopes"] == ["infer", "manage"]


def test_a_list_shows_no_secret() -> None:
    token = keys("create", "me").stdout.strip()
    assert "me" in keys("list").stdout
    for listed in (keys("list"), keys("list", "--json")):
        assert token not in listed.stdout
        assert token.removeprefix("shimpy-")[:8] not in listed.stdout


def test_revoke_ends_it(home: Path) -> None:
    token = keys("create", "me").stdout.strip()
    keys("revoke", "me")
    assert KeyFile(home / "state" / "keys.json").find(token) is None
    with pytest.raises(NotFoundError):
        keys("revoke", "me")
