"""The chat of `shimpy run` on a terminal; its commands are those of `ollama run`."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from shimpy.cli.autostart import connect
from shimpy.cli.output import waiting
from shimpy.cli.printer import print_answer
from shimpy.cli.run import parse_options
from shimpy.client import Client
from shimpy.errors import ShimpyError, UnreachableError

_HELP = """\
  /set system TEXT           Set the system message
  /set parameter NAME VALUE  Set an option, such as temperature
  /set think | nothink       Let the model think first, or not
  /set verbose | quiet       Print the timings, or not
  /show                      Show what the model is
  /clear                     Forget the conversation
  /bye                       Leave
  /?, /help                  Show this
  \"\"\"                        Begin and end a message of several lines"""


def _edit_lines() -> None:
    """Give input() history and editing, and let several pasted lines be one message."""
    with contextlib.suppress(ImportError):
        import readline

        # Python turns it off; without it each line of a pasted text is a message of its own.
        readline.parse_and_bind("set enable-bracketed-paste on")


class Chat:
    """A conversation with one model; the history lives here, not in the daemon."""

    def __init__(
        self, client: Client, request: dict[str, Any], *, hide_thinking: bool, verbose: bool
    ) -> None:
        self._client = client
        self._request = request
        self._hide_thinking = hide_thinking
        self._system: str | None = request.pop("system", None)
        self._messages: list[dict[str, Any]] = []
        self._verbose = verbose

    def run(self) -> None:
        """Load the model, then read, answer, and read again until /bye or Ctrl-D."""
        _edit_lines()
        request = self._request
        with waiting(f"loading {request['model']}"):
            self._client.load(request["model"], request.get("keep_alive"), request["options"])
        click.secho("Send a message (/? for help)", err=True, dim=True)
        while True:
            try:
                line = self._read()
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo("\nUse Ctrl-D or /bye to leave.", err=True)
                continue
            if line.strip() in {"/bye", "/exit"}:
                return
            try:
                self._handle(line)
            except KeyboardInterrupt:
                # The next prompt begins a line, whatever the answer ended with.
                click.echo(err=True)

    def _read(self) -> str:
        line = input(">>> ")
        if not line.lstrip().startswith('"""'):
            return line
        text = line.lstrip()[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + input("... ")
        return text.rstrip()[:-3]

    def _handle(self, line: str) -> None:
        try:
            # Pasted code may well begin with a comment.
            if line.startswith("/") and "\n" not in line:
                self._command(line.split())
            elif line.strip():
                self._say(line)
        except ShimpyError as error:
            click.echo(f"Error: {error.message}", err=True)

    def _say(self, text: str) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        message = {"role": "user", "content": text}
        request = {**self._request, "messages": [*system, *self._messages, message]}
        try:
            answer = self._answer(request)
        except UnreachableError:
            # The daemon in the background ends while nothing is asked of it.
            with connect():
                answer = self._answer(request)
        # Only now: a question that failed or was broken off is not part of the history.
        self._messages += [message, answer]

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return print_answer(
            self._client.chat(request), hide_thinking=self._hide_thinking, verbose=self._verbose
        )

    def _command(self, words: list[str]) -> None:
        match words:
            case ["/?" | "/help", *_]:
                click.echo(_HELP, err=True)
            case ["/clear"]:
                self._messages.clear()
                click.echo("Forgot the conversation.", err=True)
            case ["/show", *_]:
                from shimpy.cli.show import print_sections

                print_sections(self._client.show(self._request["model"]))
            case ["/set", "system", *rest] if rest:
                self._system = " ".join(rest)
            case ["/set", "parameter", name, *rest] if rest:
                self._request["options"] |= parse_options([f"{name}={' '.join(rest)}"])
            case ["/set", "think" | "nothink" as switch]:
                self._request["think"] = switch == "think"
            case ["/set", "verbose" | "quiet" as switch]:
                self._verbose = switch == "verbose"
            case _:
                click.echo(f"Unknown command {' '.join(words)!r}; /? lists them.", err=True)
