"""Bodies of the Responses API as requests in no dialect."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from shimpy.chat.messages import ChatMessage, ToolCall
from shimpy.errors import InvalidOptionError, UnsupportedError
from shimpy.server.ollama.requests import parse_model
from shimpy.server.ollama.wire import parse_keep_alive
from shimpy.server.openai.answers import new_id, now_s
from shimpy.server.openai.messages import (
    parse_arguments,
    parse_content,
    parse_format,
    parse_role,
    parse_tool,
    parse_tool_choice,
)
from shimpy.server.openai.options import parse_effort, parse_sampling
from shimpy.server.openai.requests import check_grammar
from shimpy.server.openai.responses.store import ResponseStore
from shimpy.server.openai.responses.wire import (
    FormatBody,
    ItemBody,
    ReasoningConfig,
    Response,
    ResponseBody,
    TextConfig,
)
from shimpy.server.openai.wire import FunctionBody, ResponseFormat
from shimpy.server.requests import ChatPrompt, GenerationRequest

_LOGPROBS = "message.output_text.logprobs"


class AskedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for."""

    request: GenerationRequest
    # The response as it is when nothing of the output is there yet.
    response: Response
    # What of the conversation is not the instructions.
    messages: tuple[ChatMessage, ...]
    # Characters that this request adds to the conversation.
    n_chars: int
    stream: bool


def parse_response(body: ResponseBody, store: ResponseStore) -> AskedResponse:
    """Return what POST /v1/responses asks for.

    Raises:
        UserError: the message names what is wrong.
    """
    _check_unsupported(body)
    if not body.input:
        raise InvalidOptionError("input is required: a text or a list of items", option="input")
    said = store.conversation(body.previous_response_id)
    added = parse_input(body.input)
    messages = _named([*said, *added])
    if not messages:
        raise InvalidOptionError("the input holds no message", option="input")
    return AskedResponse(
        request=_generation(body, messages),
        response=_response(body),
        messages=messages,
        n_chars=sum(map(n_chars, added)),
        stream=bool(body.stream),
    )


def parse_input(given: str | Sequence[ItemBody]) -> list[ChatMessage]:
    """Return an input as messages: a thought, a text and calls in a row are one of them.

    Raises:
        InvalidOptionError: an item that can't be taken.
    """
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    messages: list[ChatMessage] = []
    for i, item in enumerate(given):
        message = _item(item, f"input[{i}]")
        last = messages[-1] if messages else None
        if last is not None and _belongs_to(last, message):
            messages[-1] = replace(
                last,
                thinking=last.thinking or message.thinking,
                content=last.content or message.content,
                tool_calls=last.tool_calls + message.tool_calls,
            )
        else:
            messages.append(message)
    return messages


def n_chars(message: ChatMessage) -> int:
    """Return about how much a message takes to keep."""
    calls = sum(len(call.name) + len(str(call.arguments)) for call in message.tool_calls)
    return len(message.content) + len(message.thinking) + calls + sum(map(len, message.images))


def _generation(body: ResponseBody, messages: tuple[ChatMessage, ...]) -> GenerationRequest:
    instructions = (ChatMessage(role="system", content=body.instructions or ""),)
    tools, choice = parse_tool_choice(
        body.tool_choice,
        tuple(
            parse_tool(
                tool.type,
                FunctionBody(
                    name=tool.name or "", description=tool.description, parameters=tool.parameters
                ),
                f"tools[{i}]",
            )
            for i, tool in enumerate(body.tools or [])
        ),
        allows_several=body.parallel_tool_calls is not False,
    )
    output_format = parse_format(_format(body), name="text.format")
    check_grammar(body.grammar, has_format=output_format is not None)
    wants_logprobs = body.top_logprobs is not None or _LOGPROBS in (body.include or [])
    return GenerationRequest(
        model=parse_model(body.model),
        prompt=ChatPrompt(
            messages=(*(instructions if body.instructions else ()), *messages),
            tools=tools,
            tool_choice=choice,
        ),
        options=parse_sampling(
            body,
            max_tokens=("max_output_tokens", body.max_output_tokens),
            n_logprobs=("top_logprobs", (body.top_logprobs or 0) if wants_logprobs else None),
        ),
        output_format=output_format,
        grammar=body.grammar or None,
        keep_alive_s=parse_keep_alive(body.keep_alive),
        think=parse_effort(
            "reasoning.effort", body.reasoning.effort if body.reasoning is not None else None
        ),
        think_is_hint=True,
        truncate=body.truncation == "auto",
    )


def _response(body: ResponseBody) -> Response:
    shown = body.text.format if body.text is not None else None
    return Response(
        id=new_id("resp_"),
        created_at=now_s(),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model or "",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=ReasoningConfig(effort=body.reasoning.effort if body.reasoning else None),
        store=body.store is not False,
        temperature=body.temperature,
        text=TextConfig(format=shown or FormatBody(type="text")),
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=body.tools or [],
        top_p=body.top_p,
        truncation=body.truncation or "disabled",
    )


def _check_unsupported(body: ResponseBody) -> None:
    for name, instead in (
        ("background", "wait for the answer"),
        ("conversation", "use previous_response_id"),
        ("prompt", "send the text as instructions and input"),
    ):
        if getattr(body, name):
            raise UnsupportedError(f"{name} is not supported; {instead}")
    if body.truncation not in {None, "auto", "disabled"}:
        raise InvalidOptionError(
            f"truncation must be auto or disabled, not {body.truncation!r}", option="truncation"
        )


def _format(body: ResponseBody) -> ResponseFormat | None:
    given = body.text.format if body.text is not None else None
    return None if given is None else ResponseFormat(type=given.type, schema=given.schema)


def _item(item: ItemBody, where: str) -> ChatMessage:
    match item.type:
        case None | "message":
            text, images = parse_content(item.content, where)
            role = parse_role(item.role or "", where)
            return ChatMessage(role=role, content=text, images=images)
        case "function_call":
            call = ToolCall(
                id=item.call_id or "",
                name=item.name or "",
                arguments=parse_arguments(item.arguments, f"{where}.arguments"),
            )
            return ChatMessage(role="assistant", tool_calls=(call,))
        case "function_call_output":
            text, images = parse_content(item.output, where)
            return ChatMessage(
                role="tool", content=text, images=images, tool_call_id=item.call_id or ""
            )
        case "reasoning":
            thought, _ = parse_content(item.content, where)
            summary, _ = parse_content(item.summary, where)
            return ChatMessage(role="assistant", thinking=thought or summary)
        case _:
            raise InvalidOptionError(
                f'"{where}" is of type {item.type[:40]!r}; messages, function calls, their '
                "outputs and reasoning are taken",
                option=where,
            )


def _belongs_to(last: ChatMessage, message: ChatMessage) -> bool:
    """Whether both are parts of one turn of the assistant's, in the order that it has them."""
    if last.role != "assistant" or message.role != "assistant" or message.thinking:
        return False
    return not (message.content and (last.content or last.tool_calls))


def _named(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages with each tool's result under the tool's name."""
    called = {call.id: call.name for message in messages for call in message.tool_calls}
    return tuple(
        replace(message, tool_name=called.get(message.tool_call_id, ""))
        if message.role == "tool" and not message.tool_name
        else message
        for message in messages
    )
