"""A request and a model's card as what the worker is told: prompt, sampling, stop strings.

It renders templates, which takes milliseconds to some hundred for long conversations: call it
in a thread.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from datetime import datetime

from shimpy.chat.formats import choose_format
from shimpy.chat.parser import OutputParser, make_parser
from shimpy.chat.template import Rendered
from shimpy.errors import UnsupportedError
from shimpy.protocol.messages import Fim, PromptPart, Submit, Text, Tokens
from shimpy.registry.model import Model
from shimpy.server.cards import ModelCard
from shimpy.server.requests import ChatPrompt, GapPrompt, GenerationRequest, PlainPrompt

# Ollama's.
DEFAULT_N_KEEP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What goes to the worker, and what makes sense of its answer."""

    # Its `request` is chosen by the lease.
    submit: Submit
    # None: the answer is content from end to end.
    parser: OutputParser | None


def prepare(request: GenerationRequest, model: Model, card: ModelCard, now: datetime) -> Prepared:
    """Return a request as a Submit and the parser of its answer; `now` is for templates.

    Raises:
        UnsupportedError: the model lacks a capability that the request needs.
        UserError: the template refuses the conversation, or the format can't be compiled.
    """
    check_capabilities(request, model, card)
    rendered, parser, show_special = _render(request, card, now)
    options = request.options
    n_predict = -1 if options.n_predict is None else max(-1, options.n_predict)
    n_keep = options.n_keep
    submit = Submit(
        request=0,
        prompt=rendered.parts,
        sampling=options.sampling(grammar_of(request)),
        stop=list(dict.fromkeys((*(options.stop or ()), *rendered.stop))),
        n_predict=n_predict,
        add_bos=rendered.add_bos,
        n_keep=DEFAULT_N_KEEP if n_keep is None or n_keep < 0 else n_keep,
        truncate=request.truncate,
        shift=request.shift,
        return_tokens=request.wants_tokens,
        show_special=show_special,
    )
    return Prepared(submit=submit, parser=parser)


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
    if isinstance(prompt, GapPrompt) and shape is not None and not shape.has_fim:
        raise UnsupportedError(
            f'"{model.name}" does not support insert: its vocabulary has no fill-in-the-middle '
            "tokens"
        )
    if isinstance(prompt, ChatPrompt):
        if request.think and not card.template.supports_thinking:
            raise UnsupportedError(f'"{model.name}" does not support thinking')
        if any(message.images for message in prompt.messages):
            raise UnsupportedError(f'"{model.name}" does not support vision')


def _render(
    request: GenerationRequest, card: ModelCard, now: datetime
) -> tuple[Rendered, OutputParser | None, bool]:
    prompt = request.prompt
    match prompt:
        case PlainPrompt(text=text):
            has_bos = bool(card.bos_text) and text.startswith(card.bos_text)
            parts: list[PromptPart] = [Text(text, parse_special=True)]
            return Rendered(parts=parts, add_bos=not has_bos), None, False
        case GapPrompt(prefix=prefix, suffix=suffix):
            return Rendered(parts=gap_parts(prefix, suffix)), None, False
        case ChatPrompt():
            return _render_chat(request, prompt, card, now)


def _render_chat(
    request: GenerationRequest, prompt: ChatPrompt, card: ModelCard, now: datetime
) -> tuple[Rendered, OutputParser | None, bool]:
    template = card.template
    if prompt.template is not None:
        template = card.compile_template(prompt.template)
    elif prompt.is_one_turn and template.family and not template.problem:
        # A model without a template: its prompt is the text alone, as in Ollama.
        text = "\n\n".join(message.content for message in prompt.messages)
        return _continued(Rendered(parts=[Text(text)]), prompt), None, False
    think = request.think
    if request.output_format is not None and think is None:
        # The grammar holds from the first token on: there is no room for a thought before it.
        think = False
    rendered = template.render(prompt.messages, now=now, tools=prompt.tools, think=think)
    chat_format = choose_format(template, with_tools=bool(prompt.tools))
    parser = make_parser(
        chat_format,
        prompt=rendered.text,
        tools=prompt.tools,
        split_thinking=request.output_format is None,
        call_id=f"call_{secrets.token_hex(4)}_",
    )
    return _continued(rendered, prompt), parser, chat_format.show_special


def _continued(rendered: Rendered, prompt: ChatPrompt) -> Rendered:
    """Put the tokens of earlier turns before the prompt; they have the start token already."""
    if not prompt.context:
        return rendered
    return replace(rendered, parts=[Tokens(list(prompt.context)), *rendered.parts], add_bos=False)


def gap_parts(prefix: str, suffix: str) -> list[PromptPart]:
    """Return the prompt of a gap, prefix first, by the model's own tokens."""
    return [Fim("prefix"), Text(prefix), Fim("suffix"), Text(suffix), Fim("middle")]


def grammar_of(request: GenerationRequest) -> str | None:
    """Return the grammar that the answer must follow; None: free text."""
    if request.output_format is None:
        return None
    raise UnsupportedError("format is not supported yet")
