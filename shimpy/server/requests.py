"""What a client wants of a model, in no dialect's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from shimpy.chat.fim import ContextFile
from shimpy.chat.messages import ChatMessage, ToolSpec
from shimpy.server.options import Options

ThinkLevel = Literal["low", "medium", "high", "max"]
Think = bool | ThinkLevel | None


class PlainPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Text as the client wrote it, control tokens included; no template."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the client gave them: no template, and no start token before them."""

    ids: tuple[int, ...]


class MixedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Pieces as the client wrote them, text or tokens; a start token only before a text."""

    pieces: tuple[str | tuple[int, ...], ...]


class GapPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Text before and after a gap that the model fills by its own fill-in-the-middle tokens.

    What does not fit the context is cut: of `context` first, from its beginning.
    """

    prefix: str
    suffix: str
    # What the answer begins with; it is not said again.
    middle: str = ""
    # Other files of the repository, the most useful ones last.
    context: tuple[ContextFile, ...] = ()


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model may, must or must not call the tools that it is offered."""

    mode: Literal["auto", "none", "required"] = "auto"
    # The tool that has to be called, where one is required; "": any.
    name: str = ""
    # One answer may make several calls; False: what comes after the first is left out.
    allows_several: bool = True


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation, rendered by the model's template, or by the request's own."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    # Tokens of an earlier answer that this turn follows.
    context: tuple[int, ...] = ()
    # The last message is the assistant's, and the answer goes on from where it stops.
    continues: bool = False
    # Jinja.
    template: str | None = None
    # More values for the template, as llama.cpp's chat_template_kwargs.
    variables: Mapping[str, Any] = msgspec.field(default_factory=dict)
    # A single prompt: a model without a template gets it as it is, and one that is set to.
    is_one_turn: bool = False
    is_raw: bool = False

    @property
    def offered_tools(self) -> tuple[ToolSpec, ...]:
        """The tools that the model gets to know of."""
        return () if self.tool_choice.mode == "none" else self.tools


Prompt = PlainPrompt | TokenPrompt | MixedPrompt | GapPrompt | ChatPrompt


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants, in no dialect."""

    model: str
    prompt: Prompt
    options: Options = msgspec.field(default_factory=Options)
    # "json", a JSON schema, or None for free text.
    output_format: Literal["json"] | Mapping[str, Any] | None = None
    # GBNF that the whole answer follows; it wins over `output_format` and the tools.
    grammar: str | None = None
    keep_alive_s: float | None = None
    think: Think = None
    # A model that can't think answers without; else that is an error.
    think_is_hint: bool = False
    # A prompt over the context is cut in its middle; else it is an error.
    truncate: bool = False
    # Generation goes on past a full context, forgetting its beginning.
    shift: bool = False
    # Finished carries the tokens of prompt and answer.
    wants_tokens: bool = False
