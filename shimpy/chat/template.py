"""Renders a conversation as a prompt, by the model's own template where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from shimpy.chat.adapt import adapt, merge_thinking, message_dict, system_into_user, tidy, tool_dict
from shimpy.chat.budget import TemplateFault
from shimpy.chat.families import choose_family
from shimpy.chat.gotemplate import GoTemplate, is_go_template
from shimpy.chat.guard import ControlTokens, Guard
from shimpy.chat.messages import ChatMessage, ToolSpec
from shimpy.chat.rendered import Rendered
from shimpy.chat.traits import Traits, think_variables
from shimpy.errors import UserError
from shimpy.protocol.messages import PromptPart, Text

if TYPE_CHECKING:
    # Jinja takes a while to import: the daemon listens before it needs it, below.
    from shimpy.chat.sandbox import CompiledTemplate


class ChatTemplate:
    """A model's prompt format. Immutable: it may render in several threads at once."""

    def __init__(
        self,
        *,
        source: str,
        compiled: CompiledTemplate | GoTemplate,
        traits: Traits,
        control: ControlTokens,
        specials: Mapping[str, str],
        family: str = "",
        stop: tuple[str, ...] = (),
        problem: str = "",
        with_tools: ChatTemplate | None = None,
    ) -> None:
        self.source = source
        self.traits = traits
        # The name of the fallback that is used; "": the model's own template.
        self.family = family
        self.stop = stop
        # Why another template, that should be used, can't be; "": there is none.
        self.problem = problem
        self._compiled = compiled
        self._control = control
        self._specials = specials
        self._with_tools = with_tools

    @classmethod
    def compile(
        cls,
        source: str | None,
        *,
        control_tokens: Iterable[str] = (),
        arch: str = "",
        name: str = "",
        bos_text: str = "",
        eos_text: str = "",
        tool_source: str | None = None,
        strict: bool = False,
    ) -> ChatTemplate:
        """Compile a template, or the family's where the model has none that works.

        A template may be Jinja or, as Ollama's are, Go. `control_tokens` are those that
        `vocabulary.control_tokens` gives; `tool_source` is the file's separate template for
        tools (tokenizer.chat_template.tool_use). Takes some 10 to 100 ms, as the template is
        tried out: don't call it on the event loop.

        Raises:
            UserError: `strict`, and the template can't be used.
        """
        control = ControlTokens(control_tokens)
        specials = {"bos_token": bos_text, "eos_token": eos_text}
        problem = ""
        if source and source.strip():
            try:
                own = cls._make(source, control, specials)
            except TemplateFault as fault:
                problem = str(fault)
                if strict:
                    raise UserError(f"this chat template can't be used: {problem}") from fault
            else:
                if tool_source:
                    own._with_tools = cls._make_or_none(tool_source, control, specials)  # noqa: SLF001 - still being built
                return own
        family = choose_family(control, arch=arch, name=name)
        made = cls._make(family.template, control, specials)
        made.family, made.stop, made.problem = family.name, family.stop, problem
        return made

    @classmethod
    def _make(
        cls, source: str, control: ControlTokens, specials: Mapping[str, str]
    ) -> ChatTemplate:
        from shimpy.chat.probes import probe_go_traits, probe_traits
        from shimpy.chat.sandbox import compile_template

        compiled: CompiledTemplate | GoTemplate
        if is_go_template(source):
            try:
                compiled = GoTemplate(source, control_tokens=control)
            except UserError as error:
                raise TemplateFault(error.message) from error
            traits = probe_go_traits(compiled)
        else:
            compiled = compile_template(source)
            traits = probe_traits(compiled, specials)
        return cls(
            source=source, compiled=compiled, traits=traits, control=control, specials=specials
        )

    @classmethod
    def _make_or_none(
        cls, source: str, control: ControlTokens, specials: Mapping[str, str]
    ) -> ChatTemplate | None:
        try:
            return cls._make(source, control, specials)
        except TemplateFault:
            return None

    @property
    def supports_tools(self) -> bool:
        """Whether the model's own template knows tools; the generic way works for all."""
        traits = self.for_tools().traits
        return traits.tools or (traits.tool_calls and traits.tool_results)

    @property
    def supports_thinking(self) -> bool:
        """Whether the model thinks before it answers, as far as its template tells."""
        return self.traits.thinking

    def has_control(self, text: str) -> bool:
        """Whether the text holds a control token of the model."""
        return bool(self._control.find(text))

    def for_tools(self) -> ChatTemplate:
        """Return the template that is used when there are tools: this one, mostly."""
        return self._with_tools or self

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        now: datetime,
        tools: Sequence[ToolSpec] = (),
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        think: bool | str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Return the prompt of a conversation.

        `think` is None for the template's own default, or a level such as "high";
        `continue_final` leaves the last message open, which must be an assistant's;
        `variables` are more values for the template.

        Raises:
            UserError: the template refuses the conversation, or fails on it.
        """
        if tools and self._with_tools is not None:
            return self._with_tools.render(
                messages,
                now=now,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final=continue_final,
                think=think,
                variables=variables,
            )
        if isinstance(self._compiled, GoTemplate):
            return self._render_go(self._compiled, messages, now=now, tools=tools, think=think)
        return self._render_jinja(
            self._compiled,
            messages,
            now=now,
            think=think,
            request=_Request(
                tools=tools,
                continue_final=continue_final,
                add_generation_prompt=add_generation_prompt and not continue_final,
                variables=variables or {},
            ),
        )

    def _render_go(
        self,
        template: GoTemplate,
        messages: Sequence[ChatMessage],
        *,
        now: datetime,
        tools: Sequence[ToolSpec],
        think: bool | str | None,
    ) -> Rendered:
        adapted = adapt(messages, tools, self.traits)
        offered = tools if self.traits.tools else ()
        rendered = template.render(adapted, now=now, tools=offered, think=think)
        return replace(rendered, add_bos=self._adds_bos(rendered.parts))

    def _adds_bos(self, parts: Sequence[PromptPart]) -> bool:
        """Whether the engine may put the start token first: the template has not."""
        bos = self._specials["bos_token"]
        first = parts[0] if parts else None
        written = isinstance(first, Text) and first.parse_special and first.text.startswith(bos)
        return not (bos and written)

    def _render_jinja(
        self,
        template: CompiledTemplate,
        messages: Sequence[ChatMessage],
        *,
        now: datetime,
        think: bool | str | None,
        request: _Request,
    ) -> Rendered:
        from shimpy.chat.sandbox import strftime_now

        extra = {
            **self._specials,
            **think_variables(think=think, literals=template.literals),
            "strftime_now": strftime_now(now),
            "documents": None,
            "add_generation_prompt": request.add_generation_prompt,
        }
        adapted = adapt(messages, request.tools, self.traits)
        faults: list[TemplateFault] = []
        for change in _LADDER:
            changed = change(adapted)
            if faults and changed == adapted:
                continue
            try:
                return self._render_once(template, changed, request, extra)
            except TemplateFault as fault:
                faults.append(fault)
                if fault.kind == "exhausted":
                    break
        raise UserError(f"the model's chat template can't render this: {faults[0]}") from faults[0]

    def _render_once(
        self,
        template: CompiledTemplate,
        messages: Sequence[ChatMessage],
        request: _Request,
        extra: Mapping[str, Any],
    ) -> Rendered:
        guard = Guard(self._control, template.literals)
        dicts = [message_dict(message, self.traits) for message in messages]
        tools = [tool_dict(tool) for tool in request.tools] if self.traits.tools else []
        guard.reserve(dicts, tools, request.variables, self.source, self._specials)
        cut = guard.spare() if request.continue_final else ""
        if cut:
            last = replace(messages[-1], content=messages[-1].content + cut)
            dicts[-1] = message_dict(last, self.traits)
        known = {
            **extra,
            **guard.protect_value(request.variables),
            "messages": guard.protect_value(dicts),
            "tools": guard.protect_value(tools) or None,
        }
        text = template.render(known, n_input_chars=guard.n_chars, n_messages=len(messages))
        if cut:
            text, found, _ = text.partition(cut)
            if not found:
                raise TemplateFault("the template does not print the last message")
        parts = guard.split(text)
        return Rendered(parts=parts, add_bos=self._adds_bos(parts), stop=self.stop)


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    tools: Sequence[ToolSpec]
    continue_final: bool
    add_generation_prompt: bool
    variables: Mapping[str, Any]


def _as_is(messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    return messages


def _tidy(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    return tidy(merge_thinking(messages))


def _tidy_without_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    return tidy(system_into_user(_tidy(messages)))


# What is tried, in this order, when a template refuses a conversation.
_LADDER: tuple[Callable[[Sequence[ChatMessage]], Sequence[ChatMessage]], ...] = (
    _as_is,
    merge_thinking,
    _tidy,
    _tidy_without_system,
)
