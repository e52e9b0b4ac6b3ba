"""Finds a template's traits by rendering small conversations of words that stand nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from typing import Any

from msgspec.structs import replace

from shimpy.chat.adapt import message_dict, tool_dict
from shimpy.chat.budget import TemplateFault
from shimpy.chat.gotemplate import GoTemplate
from shimpy.chat.messages import ChatMessage, ToolCall, ToolSpec
from shimpy.chat.sandbox import CompiledTemplate, strftime_now
from shimpy.chat.traits import THINKING_KEYS, Traits, think_variables
from shimpy.errors import UserError

# A user's words are echoed by every template; what follows them is the template's own.
_USER = "probeuserwords"
_SYSTEM = "probesystemwords"
_ANSWER = "probeanswerwords"
_THOUGHT = "probethoughtwords"
_RESULT = "proberesultwords"
_TOOL = "probe_tool"
_OTHER_TOOL = "probe_second_tool"
_KEY = "probe_key"
_VALUE = "probe_value"
_CLOSING_TAGS = ("</think>", "[/THINK]", "<|END_THINKING|>", "</thinking>", "</seed:think>")

_CALL = ToolCall(id="call_1", name=_TOOL, arguments={_KEY: _VALUE})
_SPEC = ToolSpec(
    name=_TOOL,
    description="probe",
    parameters={
        "type": "object",
        "properties": {_KEY: {"type": "string", "description": "probe"}},
        "required": [_KEY],
    },
)
_user = ChatMessage(role="user", content=_USER)
_system = ChatMessage(role="system", content=_SYSTEM)
_result = ChatMessage(role="tool", content=_RESULT, tool_name=_TOOL, tool_call_id="call_1")
_now = datetime(2025, 1, 1, tzinfo=UTC)


def probe_traits(template: CompiledTemplate, specials: Mapping[str, str]) -> Traits:
    """Return what the template can do; `specials` are bos_token and eos_token.

    Raises:
        TemplateFault: it prints no user's message, so that it can't be used at all.
    """
    probe = _Probe(template, specials)
    traits = Traits(thinking_keys=tuple(k for k in THINKING_KEYS if k in template.keys))
    for typed in (False, True):
        traits = replace(traits, typed_content=typed)
        if _USER in probe.text([_user], traits) or _USER in probe.text([_system, _user], traits):
            break
    else:
        raise TemplateFault(probe.fault or "the template does not print the user's message")
    traits = replace(
        traits,
        system=_SYSTEM in probe.text([_system, _user], traits),
        developer="developer" in template.keys,
        tools=_prints_tools(probe, traits),
        prompt_end=probe.text([_user], traits).rpartition(_USER)[2],
    )
    return _with_thinking(probe, _with_calls(probe, traits), template)


def probe_go_traits(template: GoTemplate) -> Traits:
    """Return what a Go template can do.

    Raises:
        TemplateFault: it prints no user's message, so that it can't be used at all.
    """

    def text(*messages: ChatMessage) -> str:
        try:
            return template.render(messages, now=_now, tools=[_SPEC]).text
        except UserError as error:
            raise TemplateFault(error.message) from error

    end = text(_user).rpartition(_USER)
    if not end[1]:
        raise TemplateFault("the template does not print the user's message")
    calls = "ToolCalls" in template.fields
    sample = ""
    if calls:
        call = ChatMessage(role="assistant", tool_calls=(_CALL,))
        sample = text(_user, call, _result).rpartition(_USER)[2].partition(_RESULT)[0]
    return Traits(
        system=_SYSTEM in text(_system, _user),
        tools=template.takes_tools,
        tool_calls=calls,
        tool_results=calls,
        thinking=bool(template.fields & {"Thinking", "Think", "ThinkLevel", "IsThinkSet"}),
        call_sample=sample,
        prompt_end=end[2],
    )


class _Probe:
    """Renders a conversation; a failure is the empty text."""

    def __init__(self, template: CompiledTemplate, specials: Mapping[str, str]) -> None:
        self._template = template
        self._specials = specials
        self.fault = ""

    def text(
        self,
        messages: Sequence[ChatMessage],
        traits: Traits,
        *,
        tools: Sequence[ToolSpec] = (),
        think: bool | None = None,
    ) -> str:
        variables: dict[str, Any] = {
            **self._specials,
            **think_variables(think=think, literals=self._template.literals),
            "messages": [message_dict(message, traits) for message in messages],
            "tools": [tool_dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": messages[-1].role != "assistant",
            "strftime_now": strftime_now(_now),
        }
        try:
            return self._template.render(variables, n_input_chars=0)
        except TemplateFault as fault:
            self.fault = self.fault or str(fault)
            return ""


def _prints_tools(probe: _Probe, traits: Traits) -> bool:
    return any(
        _TOOL in probe.text(messages, traits, tools=[_SPEC])
        for messages in ([_user], [_system, _user])
    )


def _with_calls(probe: _Probe, traits: Traits) -> Traits:
    """Try every way to pass a call until one comes out as written."""
    for way in _ways(traits):
        call = ChatMessage(role="assistant", tool_calls=(_CALL,))
        text = probe.text([_user, call, _result], way, tools=[_SPEC])
        sample = text.rpartition(_USER)[2].partition(_RESULT)[0]
        if _call_is_whole(sample):
            return replace(
                way,
                tool_calls=True,
                tool_results=_RESULT in text,
                call_sample=sample,
                one_call=not _prints_two_calls(probe, way),
            )
    return traits


def _prints_two_calls(probe: _Probe, traits: Traits) -> bool:
    other = replace(_CALL, id="call_2", name=_OTHER_TOOL)
    both = ChatMessage(role="assistant", tool_calls=(_CALL, other))
    text = probe.text([_user, both, _result, replace(_result, tool_call_id="call_2")], traits)
    return _OTHER_TOOL in text


def _ways(traits: Traits) -> Iterator[Traits]:
    for short, null, text in product((False, True), repeat=3):
        yield replace(traits, short_ids=short, null_content=null, text_arguments=text)


def _call_is_whole(text: str) -> bool:
    """Whether the call is there as JSON or tags: not escaped, and not in Python's notation."""
    broken = (f'\\"{_KEY}', f"'{_KEY}'")
    return all(word in text for word in (_TOOL, _KEY, _VALUE)) and not any(
        word in text for word in broken
    )


def _with_thinking(probe: _Probe, traits: Traits, template: CompiledTemplate) -> Traits:
    on = probe.text([_user], traits, think=True)
    off = probe.text([_user], traits, think=False)
    for parts in (False, True) if "thinking" in template.keys else (False,):
        traits = replace(traits, thinking_parts=parts)
        if sample := _thinking_sample(probe, traits):
            break
    else:
        traits = replace(traits, thinking_parts=False)
        sample = ""
    closes = any(tag in text for text in template.keys for tag in _CLOSING_TAGS)
    opens = any(tag.replace("/", "") in traits.prompt_end for tag in _CLOSING_TAGS)
    return replace(
        traits,
        thinking_switch=bool(on and off) and on != off,
        thinking_sample=sample,
        thinking=(bool(on and off) and on != off) or bool(sample) or closes or opens,
    )


def _thinking_sample(probe: _Probe, traits: Traits) -> str:
    """Return what is printed before an answer that was thought about; "": no thought."""
    answer = ChatMessage(role="assistant", content=_ANSWER, thinking=_THOUGHT)
    before = probe.text([_user, answer], traits).rpartition(_USER)[2].partition(_ANSWER)[0]
    if _THOUGHT not in before and traits.tool_calls:
        call = ChatMessage(role="assistant", thinking=_THOUGHT, tool_calls=(_CALL,))
        text = probe.text([_user, call, _result], traits, tools=[_SPEC])
        before = text.rpartition(_USER)[2].partition(_TOOL)[0]
    return before if _THOUGHT in before else ""
