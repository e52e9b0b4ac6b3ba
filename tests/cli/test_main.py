"""The group of commands: help, exit codes, and what stays unimported."""

from __future__ import annotations

import importlib
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from shimpy.cli.main import ALIASES, COMMANDS, cli
from shimpy.cli.run import parse_options
from shimpy.errors import InvalidOptionError
from tests.daemon import shimpy


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_explains_itself(name: str) -> None:
    """The group's table stands in for modules that it does not import."""
    command = importlib.import_module(COMMANDS[name][0]).command
    assert command.name == name
    assert (command.help or "").split()[0] == COMMANDS[name][1].split()[0]


def test_help_names_every_command_and_imports_none() -> None:
    """What makes `--help` quick is what it does not import."""
    heavy = ["httpx", "rich", "aiohttp", "msgspec", "jinja2", "structlog", "huggingface_hub"]
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from shimpy.cli.main import cli\n"
        "print(CliRunner().invoke(cli, ['--help']).output)\n"
        f"print('imported', [m for m in {heavy!r} if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert "imported []" in done.stdout
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_its_command(alias: str) -> None:
    context = click.Context(cli)
    assert cli.get_command(context, alias) is cli.get_command(context, ALIASES[alias])


def test_wrong_use_exits_2() -> None:
    assert shimpy("nope").returncode == 2
    assert shimpy("show").returncode == 2
    done = shimpy("serve", "--bind", "nowhere")
    assert done.returncode == 2
    assert "--bind: it must be an address and a port" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("flag", ["--host", "--port"])
def test_the_address_is_found_under_the_names_of_others(flag: str) -> None:
    found = CliRunner().invoke(cli, ["serve", flag, "8080"])
    assert found.exit_code == 2
    assert f"No such option: {flag}" in found.output
    assert "--bind 127.0.0.1:" in found.output
    assert flag not in CliRunner().invoke(cli, ["serve", "--help"]).output


def test_no_daemon_exits_1_and_says_where_it_looked(unused_tcp_port: int) -> None:
    import os

    done = shimpy("ps", env={**os.environ, "SHIMPY_HOST": f"127.0.0.1:{unused_tcp_port}"})
    assert done.returncode == 1
    assert f"http://127.0.0.1:{unused_tcp_port}" in done.stderr
    assert "shimpy serve" in done.stderr


def test_config_prints_every_setting_with_its_origin(tmp_path: object) -> None:
    import json
    import os

    env = {**os.environ, "SHIMPY_HOME": str(tmp_path), "SHIMPY_MAX_QUEUE": "3"}
    done = shimpy("config", "--json", env=env)
    assert json.loads(done.stdout)["max_queue"] == {"value": 3, "origin": "SHIMPY_MAX_QUEUE"}
    table = shimpy("config", env=env).stdout
    assert "max_queue" in table
    assert "5m0s" in table


def test_bare_cpu_moe_means_on() -> None:
    """As llama.cpp's own flag; a value is taken too."""
    from shimpy.cli.serve import command

    for args, expected in ((["--cpu-moe"], "on"), (["--cpu-moe", "off"], "off"), ([], None)):
        assert command.make_context("serve", list(args)).params["cpu_moe"] == expected


def test_options_are_read_as_their_types() -> None:
    pairs = ["temperature=.5", "seed=7", "stop=12", "stop=b c", "numa=true"]
    assert parse_options([*pairs, 'logit_bias={"7": -1}']) == {
        "temperature": 0.5,
        "seed": 7,
        "stop": ["12", "b c"],
        "numa": True,
        "logit_bias": {"7": -1},
    }


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("temperature", r"temperature=0\.2"),
        ("=1", r"temperature=0\.2"),
        ("temperatures=1", "unknown parameter 'temperatures'; did you mean temperature\\?"),
        ("n_ctx=4096", "did you mean num_ctx"),
        ("bogus=1", "there are .*temperature"),
        ("temperature=hot", "\"temperature\" must be of type float32, not 'hot'"),
        ("temperature=", "\"temperature\" must be of type float32, not ''"),
        ("num_ctx=8k", "\"num_ctx\" must be of type integer, not '8k'"),
        ("num_ctx=-5", '"num_ctx" must be from 1 to 2147483647, not -5'),
        ("numa=maybe", "\"numa\" must be of type boolean, not 'maybe'"),
        ("logit_bias=[1]", "must be an object"),
    ],
)
def test_options_that_can_not_be_are_refused(pair: str, told: str) -> None:
    """The daemon ignores what it does not know, as Ollama does: here a typo is told."""
    with pytest.raises(InvalidOptionError, match=told):
        parse_options([pair])


def test_an_option_without_effect_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_options(["num_thread=2", "seed=1"]) == {"num_thread": 2, "seed": 1}
    assert capsys.readouterr().err.splitlines() == [
        "num_thread has no effect in shimpy, which sees to that by itself"
    ]


@pytest.mark.parametrize("flags", [["--raw"], ["--suffix", "x"]], ids=" ".join)
def test_what_means_nothing_in_a_chat_is_refused(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shimpy.cli.run._prompt_text", lambda _words: None)
    result = CliRunner().invoke(cli, ["run", "m", *flags])
    assert result.exit_code == 2
    assert f"{flags[0]} needs a prompt" in result.output


@pytest.mark.parametrize(("typed", "meant"), [("lst", "list"), ("eventz", "events")])
def test_a_command_that_is_none_is_told_with_the_nearest(typed: str, meant: str) -> None:
    result = CliRunner().invoke(cli, [typed])
    assert result.exit_code == 2
    assert f"No such command '{typed}'. Did you mean '{meant}'?" in result.output


def test_a_bad_keepalive_is_refused_before_anything_is_asked() -> None:
    result = CliRunner().invoke(cli, ["run", "m", "hello", "--keepalive", "soon"])
    assert result.exit_code == 2
    assert "--keepalive" in result.output


def test_a_schema_that_is_no_json_is_an_error() -> None:
    result = CliRunner().invoke(cli, ["run", "m", "hello", "--format", "{"])
    assert isinstance(result.exception, Exception)
    assert "JSON schema" in str(result.exception)
