"""A request and a model's card as what the worker is told: prompt, sampling, stop strings.

It renders templates, which takes tenths of milliseconds, but up to some hundred for long
conversations: what `is_short` does not vouch for belongs in a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec
from msgspec.structs import replace

from shimpy.chat.answers import call_answer, json_answer
from shimpy.chat.fim import fim_prompt
from shimpy.chat.formats import ChatFormat, choose_format
from shimpy.chat.messages import ToolSpec
from shimpy.chat.parser import OutputParser, make_parser
from shimpy.chat.rendered import Rendered
from shimpy.chat.schema import schema_grammar
from shimpy.chat.template import ChatTemplate
from shimpy.errors import UnsupportedError
from shimpy.protocol.messages import PromptPart, Submit, Text, Tokens
from shimpy.registry.model import Model
from shimpy.server.cards import ModelCard
from shimpy.server.requests import (
    ChatPrompt,
    GapPrompt,
    GenerationRequest,
    MixedPrompt,
    PlainPrompt,
    TokenPrompt,
    ToolChoice,
)

# Ollama's.
DEFAULT_N_KEEP = 4
# To render so much takes no longer than to wait for a thread that does (0.2 to 0.4 ms).
_SHORT_CHARS = 4000
_SHORT_MESSAGES = 16


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What goes to the worker, and what makes sense of its answer."""

    # Its `request` is chosen by the lease.
    submit: Submit
    # Makes a parser for one answer; it gives None where that is content from end to end.
    make_parser: Callable[[], OutputParser | None]
    # Calls after the first are left out.
    one_call: bool = False
    # Makes the prompt again with so many characters of text at most; None: it is not to be cut.
    shortened: Callable[[int], list[PromptPart]] | None = None

    def choice(self, index: int) -> Prepared:
        """Return the same for another answer to it: a given seed is counted up."""
        sampling = self.submit.sampling
        if not index or sampling.seed is None:
            return self
        other = replace(sampling, seed=(sampling.seed + index) % 2**32)
        return replace(self, submit=replace(self.submit, sampling=other))


def is_short(request: GenerationRequest) -> bool:
    """Whether `prepare` takes well under a millisecond: little text, and nothing to compile."""
    if request.output_format is not None:
        return False
    match request.prompt:
        case PlainPrompt() | TokenPrompt():
            return True
        case ChatPrompt(messages=messages, tools=(), template=None):
            n_chars = sum(len(message.content) for message in messages)
            return len(messages) <= _SHORT_MESSAGES and n_chars <= _SHORT_CHARS
        case _:
            return False


def prepare(
    request: GenerationRequest, model: Model, card: ModelCard, clock: Callable[[], datetime]
) -> Prepared:
    """Return a request as a Submit and the parser of its answer; `clock` is for templates.

    Raises:
        UnsupportedError: the model lacks a capability that the request needs.
        UserError: the template refuses the conversation, or the format can't be compiled.
    """
    if request.think_is_hint and not card.template.supports_thinking:
        request = replace(request, think=None)
    check_capabilities(request, model, card)
    form = _render(request, card, clock)
    options = request.options
    n_keep = options.n_keep
    submit = Submit(
        request=0,
        prompt=form.rendered.parts,
        sampling=options.sampling(grammar_of(request, form)),
        stop=list(dict.fromkeys((*(options.stop or ()), *form.rendered.stop))),
        n_predict=-1 if options.n_predict is None else max(-1, options.n_predict),
        add_bos=form.rendered.add_bos,
        n_keep=DEFAULT_N_KEEP if n_keep is None or n_keep < 0 else n_keep,
        truncate=request.truncate,
        shift=request.shift,
        return_tokens=request.wants_tokens,
        show_special=form.chat_format is not None and form.chat_format.show_special,
    )
    prompt = request.prompt
    return Prepared(
        submit=submit,
        make_parser=lambda: _parser_of(request, form),
        one_call=isinstance(prompt, ChatPrompt) and not prompt.tool_choice.allows_several,
        shortened=_shortener(prompt, card) if isinstance(prompt, GapPrompt) else None,
    )


class _Form(msgspec.Struct, frozen=True, kw_only=True):
    """A rendered prompt, and what its answer looks like; None: plain text."""

    rendered: Rendered
    chat_format: ChatFormat | None = None


def check_capabilities(request: GenerationRequest, model: Model, card: ModelCard) -> None:
    """Refuse what the model can't do, in Ollama's words.

    Raises:
        UnsupportedError: the message names the model and the capability.
    """
    prompt, shape = request.prompt, model.shape
    is_chat = isinstance(prompt, ChatPrompt) and not prompt.is_one_turn
    if shape is not None and (shape.is_embedding or shape.is_reranker):
        wanted = "chat" if is_chat else "generate"
        raise UnsupportedError(f'"{model.name}" does not support {wanted}')
    if isinstance(prompt, GapPrompt) and not {"prefix", "suffix", "middle"} <= card.fim_roles:
        raise UnsupportedError(
            f'"{model.name}" does not support insert: its vocabulary has no fill-in-the-middle '
            "tokens"
        )
    if isinstance(prompt, ChatPrompt):
        if request.think and not card.template.supports_thinking:
            raise UnsupportedError(f'"{model.name}" does not support thinking')
        if any(message.images for message in prompt.messages):
            raise UnsupportedError(f'"{model.name}" does not support vision')


def _render(request: GenerationRequest, card: ModelCard, clock: Callable[[], datetime]) -> _Form:
    prompt = request.prompt
    match prompt:
        case PlainPrompt(text=text):
            has_bos = bool(card.bos_text) and text.startswith(card.bos_text)
            parts: list[PromptPart] = [Text(text, parse_special=True)]
            return _Form(rendered=Rendered(parts=parts, add_bos=not has_bos))
        case TokenPrompt(ids=ids):
            return _Form(rendered=Rendered(parts=[Tokens(list(ids))], add_bos=False))
        case MixedPrompt(pieces=pieces):
            return _Form(rendered=_mixed(pieces, card))
        case GapPrompt():
            return _Form(rendered=Rendered(parts=_gap_parts(prompt, card)))
        case ChatPrompt():
            return _render_chat(request, prompt, card, clock)


def _mixed(pieces: Sequence[str | tuple[int, ...]], card: ModelCard) -> Rendered:
    parts: list[PromptPart] = [
        Text(piece, parse_special=True) if isinstance(piece, str) else Tokens(list(piece))
        for piece in pieces
    ]
    first = pieces[0] if pieces else ""
    is_started = isinstance(first, tuple) or (
        bool(card.bos_text) and first.startswith(card.bos_text)
    )
    return Rendered(parts=parts, add_bos=not is_started)


def _gap_parts(
    prompt: GapPrompt, card: ModelCard, max_chars: int | None = None
) -> list[PromptPart]:
    return fim_prompt(
        prompt.prefix,
        prompt.suffix,
        roles=card.fim_roles,
        order=card.fim_order,
        middle=prompt.middle,
        context=prompt.context,
        max_chars=max_chars,
    )


def _shortener(prompt: GapPrompt, card: ModelCard) -> Callable[[int], list[PromptPart]]:
    return lambda max_chars: _gap_parts(prompt, card, max_chars)


def _render_chat(
    request: GenerationRequest,
    prompt: ChatPrompt,
    card: ModelCard,
    clock: Callable[[], datetime],
) -> _Form:
    template = card.template
    if prompt.template is not None:
        template = card.compile_template(prompt.template)
    elif prompt.is_one_turn and (prompt.is_raw or _is_guessed(template)):
        # A model without a template: its prompt is the text alone, as in Ollama.
        text = "\n\n".join(message.content for message in prompt.messages)
        return _Form(rendered=_continued(Rendered(parts=[Text(text)]), prompt))
    tools = prompt.offered_tools
    rendered = template.render(
        prompt.messages,
        now=clock(),
        tools=tools,
        continue_final=prompt.continues,
        think=request.think,
        variables=prompt.variables,
    )
    return _Form(
        rendered=_continued(rendered, prompt),
        chat_format=choose_format(template, with_tools=bool(tools)),
    )


def _is_guessed(template: ChatTemplate) -> bool:
    """Whether the model has no template of its own."""
    return bool(template.family) and not template.problem


def _continued(rendered: Rendered, prompt: ChatPrompt) -> Rendered:
    """Put the tokens of earlier turns before the prompt; they have the start token already."""
    if not prompt.context:
        return rendered
    return replace(rendered, parts=[Tokens(list(prompt.context)), *rendered.parts], add_bos=False)


def _parser_of(request: GenerationRequest, form: _Form) -> OutputParser | None:
    if form.chat_format is None:
        return None
    return make_parser(
        form.chat_format,
        prompt=form.rendered.text,
        tools=_tools_of(request),
        call_id=f"call_{secrets.token_hex(4)}_",
    )


def grammar_of(request: GenerationRequest, form: _Form) -> str | None:
    """Return the grammar that the answer must follow; None: free text.

    Raises:
        UserError: a part of the schema can't be compiled, or there is no such tool; the message
            names it.
    """
    if request.grammar is not None:
        return request.grammar
    tools, wanted = _tools_of(request), request.output_format
    choice = request.prompt.tool_choice if isinstance(request.prompt, ChatPrompt) else ToolChoice()
    if form.chat_format is not None and choice.mode == "required":
        return call_answer(
            form.chat_format,
            tools,
            name=choice.name or None,
            prompt=form.rendered.text,
            allow_thinking=request.think is not False,
        )
    if wanted is None:
        return None
    if form.chat_format is None:
        return schema_grammar({"type": "object"} if wanted == "json" else wanted)
    return json_answer(
        form.chat_format,
        schema=None if wanted == "json" else wanted,
        tools=tools,
        prompt=form.rendered.text,
        allow_thinking=request.think is not False,
    )


def _tools_of(request: GenerationRequest) -> tuple[ToolSpec, ...]:
    return request.prompt.offered_tools if isinstance(request.prompt, ChatPrompt) else ()
