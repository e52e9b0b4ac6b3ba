"""Fill-in-the-middle prompts, by the model's own tokens for it.

Source: format_prompt_infill in llama.cpp's tools/server/server-common.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import msgspec

from shimpy.errors import UnsupportedError
from shimpy.protocol.messages import Fim, PromptPart, Text

FimRole = Literal["prefix", "suffix", "middle", "repo", "separator"]
# Which of prefix and suffix the model was trained to read first; llama-server's --spm-infill.
FimOrder = Literal["prefix-first", "suffix-first"]

_SNIPPET = "\n\n--- snippet ---\n\n"
# Of the room for the file that is edited, three quarters are for what is before the cursor.
_PREFIX_SHARE = 0.75


class ContextFile(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of another file of the repository."""

    text: str
    filename: str = ""


def fim_prompt(
    prefix: str,
    suffix: str,
    *,
    roles: Collection[FimRole],
    order: FimOrder = "prefix-first",
    middle: str = "",
    context: Sequence[ContextFile] = (),
    filename: str = "",
    repository: str = "",
    max_chars: int | None = None,
) -> list[PromptPart]:
    """Return the prompt for the text between `prefix` and `suffix`, which begins with `middle`.

    `roles` are the tokens that the vocabulary has (vocabulary.fim_roles). Over `max_chars` the
    end of the prefix, the beginning of the suffix and the last of the context are kept.

    Raises:
        UnsupportedError: the model has no fill-in-the-middle tokens.
    """
    if not {"prefix", "suffix", "middle"} <= set(roles):
        raise UnsupportedError(
            "this model has no fill-in-the-middle tokens: choose one that was trained for "
            "infilling, or leave the suffix out"
        )
    if max_chars is not None:
        prefix, suffix = _cut(prefix, suffix, max_chars - len(middle))
        room = max_chars - len(prefix) - len(suffix) - len(middle)
        context = _fitting(context, room)
    parts: list[PromptPart] = []
    if context and "repo" in roles:
        parts += [Fim("repo"), Text(f"{repository or 'myproject'}\n")]
    for file in context:
        parts += _marked(file.filename or "tmp", roles) or [Text(_SNIPPET)]
        parts.append(Text(file.text))
    if context:
        parts += _marked(filename or "filename", roles)
    before: list[PromptPart] = [Fim("prefix"), Text(prefix + middle)]
    after: list[PromptPart] = [Fim("suffix"), Text(suffix)]
    parts += before + after if order == "prefix-first" else after + before
    parts.append(Fim("middle"))
    return [part for part in parts if not isinstance(part, Text) or part.text]


def _marked(filename: str, roles: Collection[FimRole]) -> list[PromptPart]:
    if "separator" not in roles:
        return []
    return [Fim("separator"), Text(f"{filename}\n")]


def _cut(prefix: str, suffix: str, room: int) -> tuple[str, str]:
    """Cut both to `room` characters together, the suffix to a quarter unless the rest is free."""
    room = max(0, room)
    n_suffix = min(len(suffix), max(room - int(room * _PREFIX_SHARE), room - len(prefix)))
    n_prefix = min(len(prefix), room - n_suffix)
    return prefix[len(prefix) - n_prefix :], suffix[:n_suffix]


def _fitting(context: Sequence[ContextFile], room: int) -> list[ContextFile]:
    """Return the last of the context that fits; files count whole."""
    result: list[ContextFile] = []
    for file in reversed(context):
        room -= len(file.text) + len(file.filename) + len(_SNIPPET)
        if room < 0:
            break
        result.insert(0, file)
    return result
