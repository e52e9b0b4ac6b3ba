"""Settings: where they come from, which source wins, and what a wrong one says."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from shimpy.config import HELP, client_url, load_config
from shimpy.errors import InvalidOptionError
from shimpy.values import split_paths


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment whose state is all in a temporary folder."""
    return {"SHIMPY_HOME": str(tmp_path / "home")}


def write_config(home: dict[str, str], text: str) -> Path:
    folder = Path(home["SHIMPY_HOME"]) / "config"
    folder.mkdir(parents=True)
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_source_wins_over_the_one_before(home: dict[str, str]) -> None:
    path = write_config(home, 'bind = "127.0.0.1:1"\nmax_queue = 7\nkeep_alive = "1h"\n')
    env = {**home, "SHIMPY_MAX_QUEUE": "8", "SHIMPY_KEEP_ALIVE": "90"}
    loaded = load_config(flags={"keep_alive": "2m", "n_ctx": None}, environ=env)
    assert loaded.config.bind == "127.0.0.1:1"
    assert loaded.config.max_queue == 8
    assert loaded.config.keep_alive == 120
    assert loaded.origins["bind"] == str(path)
    assert loaded.origins["max_queue"] == "SHIMPY_MAX_QUEUE"
    assert loaded.origins["keep_alive"] == "--keep-alive"
    assert loaded.origins["n_ctx"] == "default"


def test_all_state_is_under_shimpy_home(home: dict[str, str]) -> None:
    config = load_config(environ=home).config
    root = Path(home["SHIMPY_HOME"])
    assert {config.state_dir, config.cache_dir, config.data_dir} == {
        root / "state",
        root / "cache",
        root / "data",
    }
    assert config.model_dirs[0] == root / "data" / "models"


def test_a_named_file_is_read_instead_of_the_usual_ones(
    home: dict[str, str], tmp_path: Path
) -> None:
    write_config(home, "max_queue = 7\n")
    other = tmp_path / "other.toml"
    other.write_text('model_dirs = ["/a", "/b:/c"]\n', encoding="utf-8")
    config = load_config(file=other, environ=home).config
    assert config.max_queue == 512
    assert config.model_dirs == (Path("/a"), Path("/b"), Path("/c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_quue = 1", "max_quue in .*no such setting; did you mean max_queue"),
        ("qqq = 1", "no such setting; there are bind, "),
        ("[server]\nbind = 1", r"\[server\] in .*settings stand alone, in no table"),
        ("max_queue = -1", "max_queue in .*at least 0, not -1"),
        ("max_queue = true", "whole number"),
        ('cpu_moe = "maybe"', "one of auto, on, off"),
        ('keep_alive = "soon"', "not a duration"),
        ('drain_timeout = "-1"', "limited time"),
        ('bind = "nowhere"', "address and a port"),
        ('bind = "127.0.0.1:99999"', "address and a port"),
        ('max_body = "big"', "not a size"),
        ("max_body = 1.5", "must be a size"),
        ("model_dirs = 3", "list of folders"),
        ("state_dir = 3", "must be a folder"),
        ("bind = ", "not valid TOML"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(
    home: dict[str, str], text: str, message: str
) -> None:
    write_config(home, text)
    with pytest.raises(InvalidOptionError, match=message):
        load_config(environ=home)


def test_a_missing_named_file_is_an_error(home: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"none\.toml: No such file"):
        load_config(file=tmp_path / "none.toml", environ=home)


def test_an_unknown_variable_is_an_error(home: dict[str, str]) -> None:
    with pytest.raises(
        InvalidOptionError, match=r"SHIMPY_MODELS_DIR: .*did you mean SHIMPY_MODEL_DIRS"
    ):
        load_config(environ={**home, "SHIMPY_MODELS_DIR": "/x"})


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5m", 300.0), ("300", 300.0), (-1, math.inf), ("-1", math.inf), ("0", 0.0), (1.5, 1.5)],
)
def test_keep_alive_is_read_as_ollama_reads_it(
    home: dict[str, str], value: Any, seconds: float
) -> None:
    assert load_config(flags={"keep_alive": value}, environ=home).config.keep_alive == seconds


@pytest.mark.parametrize(
    ("value", "expected"), [(True, "on"), (False, "off"), ("AUTO", "auto"), ("on", "on")]
)
def test_cpu_moe_takes_switches_and_words(home: dict[str, str], value: Any, expected: str) -> None:
    assert load_config(flags={"cpu_moe": value}, environ=home).config.cpu_moe == expected


def test_one_value_may_hold_several_folders() -> None:
    value = os.pathsep.join(["/a", "/b", "/a"]) + ";~/c"
    assert split_paths(value) == (Path("/a"), Path("/b"), Path.home() / "c")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11435"),
        ("example.org", "http://example.org:11435"),
        ("example.org:80", "http://example.org:80"),
        ("http://example.org", "http://example.org:80"),
        ("https://example.org", "https://example.org:443"),
        ("https://example.org/shimpy/", "https://example.org:443/shimpy"),
        ("0.0.0.0:5", "http://127.0.0.1:5"),
        ("[::]:5", "http://[::1]:5"),
    ],
)
def test_shimpy_host_is_read_as_ollama_reads_its_own(host: str, url: str) -> None:
    assert client_url({"SHIMPY_HOST": host}) == url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ('bind = "127.0.0.1:5"', "http://127.0.0.1:5"),
        ('bind = "0.0.0.0:5"', "http://127.0.0.1:5"),
        ('bind = "unix:/run/x.sock"', "unix:/run/x.sock"),
        ('bind = "a.example:5"\ntls_cert = "/c"\ntls_key = "/k"', "https://a.example:5"),
        ('bnd = "127.0.0.1:5"', "http://127.0.0.1:11435"),
    ],
)
def test_without_shimpy_host_clients_go_where_the_config_has_the_daemon_listen(
    home: dict[str, str], text: str, url: str
) -> None:
    write_config(home, text)
    assert client_url(home) == url
    assert client_url(home | {"SHIMPY_HOST": "other:6"}) == "http://other:6"


def test_a_config_that_is_closed_to_us_does_not_keep_clients_away(
    home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert client_url(home) == "http://127.0.0.1:11435"


def test_the_environment_may_name_the_config_file(home: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("max_queue = 9\n")
    assert load_config(environ=home | {"SHIMPY_CONFIG": str(path)}).config.max_queue == 9


@pytest.mark.parametrize("host", ["ftp://x", "http://", "x:y"])
def test_a_bad_shimpy_host_is_an_error(host: str) -> None:
    with pytest.raises(InvalidOptionError, match="SHIMPY_HOST"):
        client_url({"SHIMPY_HOST": host})


def test_every_setting_says_what_it_does() -> None:
    assert all(text.endswith(".") for text in HELP.values())
