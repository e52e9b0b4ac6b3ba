"""Ollama's bodies as requests in no dialect: checked here, and only here."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

from shimpy.chat.messages import ChatMessage, Role, ToolCall, ToolSpec
from shimpy.errors import InvalidOptionError, UserError
from shimpy.parameters import check_number
from shimpy.server.embedding import EmbeddingRequest
from shimpy.server.ollama.options import parse_options
from shimpy.server.ollama.wire import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    MessageBody,
    ToolBody,
    parse_keep_alive,
)
from shimpy.server.options import Options
from shimpy.server.requests import (
    ChatPrompt,
    GapPrompt,
    GenerationRequest,
    PlainPrompt,
    Prompt,
    Think,
    ThinkLevel,
)

_MAX_TOP_LOGPROBS = 20
# Ollama's text, but for the role that it lacks and avante.nvim sends.
_ROLES = "system, developer, user, assistant, tool"


def parse_generate(body: GenerateBody) -> GenerationRequest:
    """Return what POST /api/generate asks for; its prompt may be empty (load or unload).

    Raises:
        UserError: the message names what is wrong.
    """
    if body.raw and (body.template or body.system or body.context):
        raise UserError("raw mode does not support template, system, or context")
    options = parse_options(body.options)
    if body.options is None:
        options = _native_options(body).over(options)
    return GenerationRequest(
        model=parse_model(body.model),
        prompt=_generate_prompt(body),
        options=_with_logprobs(options, wanted=body.logprobs, n_top=body.top_logprobs),
        output_format=parse_format(body.format),
        keep_alive_s=parse_keep_alive(body.keep_alive),
        think=parse_think(body.think),
        truncate=bool(body.truncate),
        shift=bool(body.shift),
        wants_tokens=not body.raw,
    )


def parse_chat(body: ChatBody) -> GenerationRequest:
    """Return what POST /api/chat asks for; without messages it is to load or to unload.

    Raises:
        UserError: the message names what is wrong.
    """
    options = _with_logprobs(
        parse_options(body.options), wanted=body.logprobs, n_top=body.top_logprobs
    )
    return GenerationRequest(
        model=parse_model(body.model),
        prompt=ChatPrompt(
            messages=parse_messages(body.messages or []), tools=parse_tools(body.tools or [])
        ),
        options=options,
        output_format=parse_format(body.format),
        keep_alive_s=parse_keep_alive(body.keep_alive),
        think=parse_think(body.think),
        truncate=bool(body.truncate),
        shift=bool(body.shift),
    )


def parse_embed(body: EmbedBody) -> EmbeddingRequest:
    """Return what POST /api/embed asks for; without inputs it is to load.

    Raises:
        UserError: the message names what is wrong.
    """
    given = [body.input] if isinstance(body.input, str) else body.input or []
    return EmbeddingRequest(
        model=parse_model(body.model),
        inputs=tuple(given) if given != [""] else (),
        options=parse_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
        truncate=body.truncate is not False,
        n_dimensions=body.dimensions or None,
    )


def parse_embeddings(body: EmbeddingsBody) -> EmbeddingRequest:
    """Return what POST /api/embeddings, the older form, asks for; its vectors keep their length.

    Raises:
        UserError: the message names what is wrong.
    """
    return EmbeddingRequest(
        model=parse_model(body.model),
        inputs=(body.prompt,) if body.prompt else (),
        options=parse_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
        normalize=False,
    )


def parse_model(*names: str | None) -> str:
    """Return the first name that is given.

    Raises:
        UserError: none is.
    """
    for name in names:
        if name and name.strip():
            return name
    raise InvalidOptionError("model is required", option="model")


def parse_messages(bodies: Sequence[MessageBody]) -> tuple[ChatMessage, ...]:
    """Return the messages of a conversation.

    Raises:
        InvalidOptionError: an unknown role, or an image that is not base64.
    """
    return tuple(_message(body, i) for i, body in enumerate(bodies))


def parse_tools(bodies: Sequence[ToolBody]) -> tuple[ToolSpec, ...]:
    """Return the tools that are offered to the model.

    Raises:
        InvalidOptionError: one is no function, or has no name.
    """
    for i, body in enumerate(bodies):
        if (body.type or "function") != "function":
            raise InvalidOptionError(
                f'"tools[{i}].type" must be "function", not {body.type!r}', option="tools"
            )
        if not body.function.name:
            raise InvalidOptionError(f'"tools[{i}].function.name" is empty', option="tools")
    return tuple(
        ToolSpec(
            name=body.function.name,
            description=body.function.description or "",
            parameters=body.function.parameters or {},
        )
        for body in bodies
    )


def parse_format(value: Any) -> Literal["json"] | Mapping[str, Any] | None:
    """Return "json", a JSON schema, or None for free text.

    Raises:
        InvalidOptionError: anything else.
    """
    if value is None or value == "":
        return None
    if value == "json":
        return "json"
    if isinstance(value, dict):
        return value
    raise InvalidOptionError(
        f'invalid format: {json.dumps(value)[:100]}; expected "json" or a valid JSON Schema object',
        option="format",
    )


def parse_think(value: Any) -> Think:
    """Return whether, and how hard, the model is to think; None: as it likes.

    Raises:
        InvalidOptionError: neither a boolean nor one of the levels.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value in get_args(ThinkLevel):
        return cast("ThinkLevel", value)
    levels = ", ".join(f'"{level}"' for level in get_args(ThinkLevel))
    raise InvalidOptionError(
        f"invalid think value: {json.dumps(value)[:100]} (must be {levels}, true, or false)",
        option="think",
    )


def _generate_prompt(body: GenerateBody) -> Prompt:
    prompt = body.prompt or ""
    if body.raw:
        return PlainPrompt(text=prompt)
    if body.suffix:
        return GapPrompt(prefix=prompt, suffix=body.suffix)
    messages = list(parse_messages(body.messages or []))
    images = _images(body.images, "images")
    if prompt or images:
        messages.append(ChatMessage(role="user", content=prompt, images=images))
    # A system message alone is no prompt: the request is to load the model then.
    if messages and body.system:
        messages.insert(0, ChatMessage(role="system", content=body.system))
    return ChatPrompt(
        messages=tuple(messages),
        context=tuple(_token_id(i, token) for i, token in enumerate(body.context or [])),
        template=body.template or None,
        is_one_turn=body.messages is None,
    )


def _token_id(index: int, token: int) -> int:
    if not 0 <= token < 2**31:
        raise InvalidOptionError(f'"context[{index}]" is no token id: {token}', option="context")
    return token


def _native_options(body: GenerateBody) -> Options:
    """Return the top-level options of the older native form."""
    given = {
        "n_predict": ("max_tokens", body.max_tokens),
        "temperature": ("temperature", body.temperature),
        "top_p": ("top_p", body.top_p),
        "top_k": ("top_k", body.top_k),
    }
    values: dict[str, Any] = {}
    for ours, (theirs, value) in given.items():
        if value is not None:
            check_number(ours, theirs, value)
            values[ours] = value
    return Options(**values)


def _with_logprobs(options: Options, *, wanted: bool | None, n_top: int | None) -> Options:
    if n_top is not None and not 0 <= n_top <= _MAX_TOP_LOGPROBS:
        raise InvalidOptionError(
            f"top_logprobs must be between 0 and {_MAX_TOP_LOGPROBS}", option="top_logprobs"
        )
    if not wanted:
        return options
    return Options(n_logprobs=n_top or 0).over(options)


def _message(body: MessageBody, index: int) -> ChatMessage:
    if body.role not in get_args(Role):
        raise InvalidOptionError(
            f'invalid role: "{body.role[:40]}", role must be one of [{_ROLES}]', option="messages"
        )
    return ChatMessage(
        role=cast("Role", body.role),
        content=body.content or "",
        thinking=body.thinking or "",
        tool_calls=tuple(
            ToolCall(
                id=call.id or "",
                name=call.function.name,
                arguments=_arguments(call.function.arguments, index),
            )
            for call in body.tool_calls or []
        ),
        tool_name=body.tool_name or "",
        tool_call_id=body.tool_call_id or "",
        images=_images(body.images, f"messages[{index}].images"),
    )


def _arguments(given: Mapping[str, Any] | str | None, index: int) -> Mapping[str, Any]:
    if not isinstance(given, str):
        return given or {}
    try:
        value = json.loads(given or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidOptionError(
            f'the arguments of a tool call in "messages[{index}]" are no JSON object',
            option="messages",
        )
    return value


def _images(given: Sequence[str] | None, where: str) -> tuple[bytes, ...]:
    images = []
    for i, text in enumerate(given or []):
        try:
            images.append(base64.b64decode(text.rpartition(",")[2], validate=True))
        except (binascii.Error, ValueError):
            raise InvalidOptionError(f'"{where}[{i}]" is not valid base64', option=where) from None
    return tuple(images)
