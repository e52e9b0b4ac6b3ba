"""OpenAI's bodies as requests in no dialect: checked here, and only here."""

from __future__ import annotations

from typing import Any

import msgspec

from shimpy.errors import InvalidOptionError, UserError
from shimpy.server.embedding import EmbeddingRequest
from shimpy.server.ollama.options import parse_options
from shimpy.server.ollama.requests import parse_model
from shimpy.server.ollama.wire import parse_keep_alive
from shimpy.server.openai.messages import (
    parse_format,
    parse_messages,
    parse_tool_choice,
    parse_tools,
)
from shimpy.server.openai.options import parse_effort, parse_sampling
from shimpy.server.openai.wire import ChatBody, CompletionBody, EmbeddingBody, SamplingBody
from shimpy.server.requests import (
    ChatPrompt,
    GapPrompt,
    GenerationRequest,
    PlainPrompt,
    TokenPrompt,
)

# OpenAI's own limit.
MAX_INPUTS = 2048
_MAX_TOKEN = 2**31


class Completions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request for text asks for: `n` answers to each prompt."""

    requests: tuple[GenerationRequest, ...]
    n: int
    stream: bool
    wants_usage: bool
    # The answer begins with the prompt.
    echo: bool = False

    @property
    def model(self) -> str:
        """The model's name as the client wrote it."""
        return self.requests[0].model


def parse_chat(body: ChatBody) -> Completions:
    """Return what POST /v1/chat/completions asks for.

    Raises:
        UserError: the message names what is wrong.
    """
    if not body.messages:
        # Ollama's words.
        raise InvalidOptionError("[] is too short - 'messages'", option="messages")
    tools, choice = parse_tool_choice(
        body.tool_choice,
        parse_tools(body.tools or []),
        allows_several=body.parallel_tool_calls is not False,
    )
    messages = parse_messages(body.messages)
    if body.continue_final_message and messages[-1].role != "assistant":
        raise InvalidOptionError(
            "continue_final_message needs a last message of the assistant's",
            option="continue_final_message",
        )
    output_format = parse_format(body.response_format, name="response_format")
    check_grammar(body.grammar, has_format=output_format is not None)
    effort = body.reasoning.effort if body.reasoning is not None else None
    request = GenerationRequest(
        model=parse_model(body.model),
        prompt=ChatPrompt(
            messages=messages,
            tools=tools,
            tool_choice=choice,
            continues=bool(body.continue_final_message),
            variables=body.chat_template_kwargs or {},
        ),
        options=parse_sampling(
            body,
            max_tokens=_first_given(
                ("max_completion_tokens", body.max_completion_tokens),
                ("max_tokens", body.max_tokens),
            ),
            n_logprobs=("top_logprobs", (body.top_logprobs or 0) if body.logprobs else None),
        ),
        output_format=output_format,
        grammar=body.grammar or None,
        keep_alive_s=parse_keep_alive(body.keep_alive),
        think=parse_effort("reasoning_effort", body.reasoning_effort, effort),
        think_is_hint=True,
    )
    return _completions(body, (request,), n=body.n)


def parse_completion(body: CompletionBody) -> Completions:
    """Return what POST /v1/completions asks for; its prompts are taken as they are.

    Raises:
        UserError: the message names what is wrong.
    """
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise InvalidOptionError(
            f"best_of is not supported (it is {body.best_of}, n is {n}): ask for n answers and "
            "choose among them",
            option="best_of",
        )
    if body.echo and body.logprobs is not None:
        raise InvalidOptionError(
            "logprobs of the prompt are not computed: leave echo or logprobs out", option="logprobs"
        )
    options = parse_sampling(
        body, max_tokens=("max_tokens", body.max_tokens), n_logprobs=("logprobs", body.logprobs)
    )
    model, keep_alive_s = parse_model(body.model), parse_keep_alive(body.keep_alive)
    prompts = parse_prompts(body.prompt, "prompt")
    if body.suffix and not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidOptionError("a suffix goes with prompts of text, not tokens", option="suffix")
    requests = tuple(
        GenerationRequest(
            model=model,
            prompt=_completion_prompt(prompt, body.suffix),
            options=options,
            grammar=body.grammar or None,
            keep_alive_s=keep_alive_s,
        )
        for prompt in prompts
    )
    return _completions(body, requests, n=n, echo=bool(body.echo))


def parse_embedding(body: EmbeddingBody) -> tuple[EmbeddingRequest, bool]:
    """Return what POST /v1/embeddings asks for, and whether its answer is base64.

    Raises:
        UserError: the message names what is wrong.
    """
    if body.encoding_format not in {None, "float", "base64"}:
        raise InvalidOptionError(
            f"encoding_format must be float or base64, not {body.encoding_format!r}",
            option="encoding_format",
        )
    if body.input is None or body.input == []:
        raise InvalidOptionError("input is required: a text or a list of texts", option="input")
    request = EmbeddingRequest(
        model=parse_model(body.model),
        inputs=tuple(parse_prompts(body.input, "input")),
        options=parse_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
        truncate=bool(body.truncate),
        n_dimensions=body.dimensions,
    )
    return request, body.encoding_format == "base64"


def parse_prompts(given: str | list[Any] | None, name: str) -> list[str | tuple[int, ...]]:
    """Return prompts of text or tokens: one, or those in a list.

    Raises:
        InvalidOptionError: something else is in it, or too much; `name` is the field.
    """
    if given is None or isinstance(given, str):
        return [given or ""]
    if given and all(_is_token(item) for item in given):
        return [tuple(given)]
    if not 0 < len(given) <= MAX_INPUTS:
        raise InvalidOptionError(
            f'"{name}" may hold 1 to {MAX_INPUTS} items, not {len(given)}', option=name
        )
    return [_prompt(item, f"{name}[{i}]") for i, item in enumerate(given)]


def check_grammar(grammar: str | None, *, has_format: bool) -> None:
    """Refuse a grammar beside another form that the answer must have.

    Raises:
        UserError: both are given.
    """
    if grammar and has_format:
        raise UserError("the answer can follow a grammar or a JSON format, not both")


def _completions(
    body: SamplingBody,
    requests: tuple[GenerationRequest, ...],
    *,
    n: int | None,
    echo: bool = False,
) -> Completions:
    return Completions(
        requests=requests,
        n=1 if n is None else n,
        stream=bool(body.stream),
        wants_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        echo=echo,
    )


def _completion_prompt(
    prompt: str | tuple[int, ...], suffix: str | None
) -> PlainPrompt | TokenPrompt | GapPrompt:
    if isinstance(prompt, tuple):
        return TokenPrompt(ids=prompt)
    return GapPrompt(prefix=prompt, suffix=suffix) if suffix else PlainPrompt(text=prompt)


def _prompt(item: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and item and all(_is_token(token) for token in item):
        return tuple(item)
    raise InvalidOptionError(f'"{where}" must be a text or a list of token ids', option=where)


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < _MAX_TOKEN


def _first_given(*fields: tuple[str, int | None]) -> tuple[str, int | None]:
    return next((field for field in fields if field[1] is not None), fields[0])
