"""`shimpy run`: one answer to a prompt or to standard input, or a chat on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from shimpy.cli.options import complete_model

if TYPE_CHECKING:
    from shimpy.client import Client


def _parse_keep_alive(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> float | None:
    """Return seconds; -1 for ever."""
    import math

    from shimpy.errors import InvalidOptionError
    from shimpy.values import parse_keep_alive

    if value is None:
        return None
    try:
        seconds = parse_keep_alive(value)
    except InvalidOptionError as error:
        raise click.BadParameter(error.message) from None
    return -1.0 if math.isinf(seconds) else seconds


@click.command(name="run")
@click.argument("model", shell_complete=complete_model)
@click.argument("prompt", nargs=-1)
@click.option("--system", help="A system message.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the template.")
@click.option("--suffix", help="Text that follows the gap to be filled.")
@click.option("--format", "output_format", help='"json", or a JSON schema, for the answer.')
@click.option("--think/--no-think", default=None, help="Let the model think first, or not.")
@click.option("--hidethinking", is_flag=True, help="Do not print the thoughts.")
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="One of Ollama's parameters, such as temperature=0; repeat it for several.",
)
@click.option(
    "--keepalive",
    callback=_parse_keep_alive,
    metavar="TIME",
    help="How long the model stays loaded afterwards: 10m, 0, or -1 for ever.",
)
@click.option("--verbose", is_flag=True, help="Print the timings after the answer.")
def command(
    model: str,
    prompt: tuple[str, ...],
    output_format: str | None,
    options: tuple[str, ...],
    keepalive: float | None,
    **flags: Any,
) -> None:
    """Run MODEL on PROMPT, on standard input, or in a chat when there is neither.

    A MODEL that is not on this machine is pulled first, if it is one that can be.
    """
    from shimpy.cli.autostart import connect

    request: dict[str, Any] = {"model": model, "options": parse_options(options)}
    if keepalive is not None:
        request["keep_alive"] = keepalive
    if output_format is not None:
        request["format"] = _parse_format(output_format)
    for name in ("system", "suffix", "think"):
        if flags[name] is not None:
            request[name] = flags[name]
    if flags["raw"]:
        request["raw"] = True
    text = _prompt_text(prompt)
    for name in ("raw", "suffix"):
        if text is None and name in request:
            raise click.UsageError(f"--{name} needs a prompt: in a chat it has no meaning")
    with connect() as client:
        run = _chat if text is None else partial(_answer, text=text)
        shown = partial(run, hide_thinking=flags["hidethinking"], verbose=flags["verbose"])
        _run_present(client, request, shown)


def _run_present(
    client: Client, request: dict[str, Any], run: Callable[[Client, dict[str, Any]], None]
) -> None:
    """Run a request's model; pull it first when it is not there."""
    from shimpy.cli.pull import pull_missing, show_pull
    from shimpy.errors import NotFoundError
    from shimpy.registry.reference import is_name

    if not is_name(request["model"]):
        model = _model_of_file(client, request["model"])
        request["model"] = model or show_pull(client.pull(request["model"]))
    try:
        run(client, request)
    except NotFoundError as error:
        # It is told before the first word of an answer.
        request["model"] = pull_missing(client, request["model"], error)
        run(client, request)


def _model_of_file(client: Client, text: str) -> str | None:
    """Return what the daemon calls a GGUF file; None: the text names no file.

    Raises:
        NotFoundError: there is no such file, or the daemon does not know it; says how it would.
    """
    from pathlib import Path

    from shimpy.cli.create import known_as
    from shimpy.errors import NotFoundError

    path = Path(text).expanduser()
    if not path.is_file():
        if text.startswith((".", "/", "~")):
            raise NotFoundError(f"there is no file {path}")
        return None
    model = known_as(client, path)
    if model is None:
        raise NotFoundError(
            f"{path} is in no folder of the daemon's; `shimpy serve --model-dirs "
            f"{path.absolute().parent}` serves that folder (the setting model_dirs does for good), "
            f'and `shimpy create NAME`, with a Modelfile that says "FROM {path}", copies the file '
            "into the store"
        )
    return model


def _answer(
    client: Client, request: dict[str, Any], *, text: str, hide_thinking: bool, verbose: bool
) -> None:
    from shimpy.cli.output import wait_for_first
    from shimpy.cli.printer import print_answer

    answer = client.generate({**request, "prompt": text})
    chunks = wait_for_first(answer, f"asking {request['model']}")
    print_answer(chunks, hide_thinking=hide_thinking, verbose=verbose)


def _chat(client: Client, request: dict[str, Any], *, hide_thinking: bool, verbose: bool) -> None:
    from shimpy.cli.chat import Chat

    Chat(client, dict(request), hide_thinking=hide_thinking, verbose=verbose).run()


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Return the options in "name=value" pairs.

    Raises:
        InvalidOptionError: a pair has no '=', there is no such option, or it can't have the value.
    """
    from shimpy.cli.options import hint_if_idle
    from shimpy.errors import InvalidOptionError
    from shimpy.parameters import add_typed

    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise InvalidOptionError(f"{pair!r} is not an option; write it like temperature=0.2")
        add_typed(options, name, text)
        hint_if_idle(name)
    return options


def _parse_format(text: str) -> Any:
    import json

    from shimpy.errors import InvalidOptionError

    if text == "json":
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidOptionError(f'--format is neither "json" nor a JSON schema: {error}') from None


def _prompt_text(words: tuple[str, ...]) -> str | None:
    """Return the prompt: the words, and before them what is piped in; None: chat."""
    prompt = " ".join(words)
    if sys.stdin.isatty():
        return prompt or None
    piped = sys.stdin.buffer.read().decode(errors="replace")
    if not piped.strip():
        return prompt
    return f"{piped}\n{prompt}" if prompt else piped
