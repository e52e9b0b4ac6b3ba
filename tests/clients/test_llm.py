"""The llm command with its Ollama plugin against a real daemon: only OLLAMA_HOST is set."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result

from tests.synthetic import CHAIN_TEXT

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

TOOL = """
def get_weather(city: str) -> str:
    'Say what the weather is.'
    return f'sunny in {city}'
"""

Llm = Callable[..., Result]


@pytest.fixture(scope="module")
def llm(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llm]:
    """The command in this process: alone, it takes a second to start."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OLLAMA_HOST", url)
        patched.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
        from llm.cli import cli

        def run(*args: str, stdin: str = "", status: int = 0) -> Result:
            result = CliRunner().invoke(cli, args, input=stdin)
            assert result.exit_code == status, result.output
            return result

        yield run


def test_models_are_listed(llm: Llm) -> None:
    listed = llm("ollama", "models").stdout
    assert "chain:latest" in listed
    assert "bert:latest" in llm("embed-models").stdout


def test_the_command_in_a_process_of_its_own(llm: Llm) -> None:
    command = [sys.executable, "-m", "llm", "-m", "ollama/chain"]
    done = subprocess.run(command, input="hi", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == CHAIN_TEXT


@pytest.mark.parametrize("flags", [(), ("--no-stream",)], ids=["stream", "whole"])
def test_a_prompt(llm: Llm, flags: tuple[str, ...]) -> None:
    done = llm("-m", "ollama/chain", "-s", "Be brief.", *flags, stdin="hi")
    assert done.stdout.strip() == CHAIN_TEXT


def test_options_and_a_conversation(llm: Llm) -> None:
    done = llm("-m", "ollama/chain", "-o", "num_predict", "2", "hi")
    assert CHAIN_TEXT.startswith(done.stdout.strip())
    assert len(done.stdout) < 20
    assert llm("-c", "-m", "ollama/chain", "on").stdout.strip() == CHAIN_TEXT


def test_a_schema(llm: Llm) -> None:
    done = llm("-m", "ollama/llama", "--schema", "a int, b bool", "hi")
    value = json.loads(done.stdout)
    assert isinstance(value["a"], int)


def test_a_tool(llm: Llm) -> None:
    """The model calls without end: the chain is cut after two rounds, and was called in each."""
    flags = ("--functions", TOOL, "--td", "--cl", "2")
    done = llm("-m", "ollama/caller", *flags, "hi", status=1)
    assert "sunny in Köln" in done.stderr
    assert "Chain limit" in done.stderr


def test_an_embedding(llm: Llm) -> None:
    done = llm("embed", "-m", "ollama/bert", "-c", "a b")
    assert len(json.loads(done.stdout)) > 8


def test_an_unknown_model_is_an_error(llm: Llm) -> None:
    assert "Unknown model" in llm("-m", "ollama/nix", "hi", status=1).stderr
