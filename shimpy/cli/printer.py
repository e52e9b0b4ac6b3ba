"""An answer, printed as it streams in: text on stdout, thoughts and timings on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click

from shimpy.errors import ShimpyError

_NS_PER_S = 1e9


def print_answer(
    chunks: Iterable[dict[str, Any]], *, hide_thinking: bool, verbose: bool = False
) -> dict[str, Any]:
    """Print the chunks of /api/generate or /api/chat; return the whole as one message."""
    answer: dict[str, Any] = {"role": "assistant", "content": ""}
    thinking = ""
    last: dict[str, Any] = {}
    for chunk in _ending_lines(chunks):
        part = chunk.get("message", chunk)
        thought = part.get("thinking") or ""
        if thought and not hide_thinking:
            if not thinking:
                click.secho("Thinking...", err=True, dim=True)
            click.secho(thought, err=True, dim=True, nl=False)
        thinking += thought
        text = part.get("response", part.get("content", ""))
        if text and thinking and not answer["content"] and not hide_thinking:
            click.secho("\n...done thinking.\n", err=True, dim=True)
        click.echo(text, nl=False)
        answer["content"] += text
        answer.setdefault("tool_calls", []).extend(part.get("tool_calls") or [])
        last = chunk
    if not answer["content"].endswith("\n"):
        click.echo()
    if thinking:
        answer["thinking"] = thinking
    if not answer["tool_calls"]:
        del answer["tool_calls"]
    if last.get("done_reason") == "length":
        click.secho("(cut: the limit of tokens was reached)", err=True, dim=True)
    if verbose:
        _print_timings(last)
    return answer


def _ending_lines(chunks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the chunks; an error in the middle is told on a line of its own."""
    has_begun = False
    try:
        for chunk in chunks:
            has_begun = True
            yield chunk
    except ShimpyError:
        if has_begun:
            click.echo(err=True)
        raise


def _print_timings(final: dict[str, Any]) -> None:
    click.echo("", err=True)
    for kind, label in (("total", "total"), ("load", "load")):
        seconds = final.get(f"{kind}_duration", 0) / _NS_PER_S
        click.echo(f"{label + ' duration:':<22}{seconds:.3f} s", err=True)
    for kind, label in (("prompt_eval", "prompt"), ("eval", "generated")):
        n_tokens = final.get(f"{kind}_count", 0)
        seconds = final.get(f"{kind}_duration", 0) / _NS_PER_S
        rate = f", {n_tokens / seconds:.1f} tokens/s" if seconds else ""
        click.echo(f"{label + ':':<22}{n_tokens} tokens in {seconds:.3f} s{rate}", err=True)
