"""How a model writes its thoughts and its calls: which marks to look for in its output."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace

from shimpy.chat.template import ChatTemplate

# How the text between a call's opener and closer is written; see calls.py.
BodyKind = Literal[
    "json", "tags", "function", "named", "deepseek", "kimi", "gemma", "invoke", "python"
]


class ToolSyntax(msgspec.Struct, frozen=True, kw_only=True):
    """One way to write calls."""

    name: str
    opener: str
    closer: str = ""
    body: BodyKind = "json"
    # Marks round several calls, which mean nothing by themselves.
    noise: tuple[str, ...] = ()


class ThinkingTags(msgspec.Struct, frozen=True, kw_only=True):
    """The marks round a thought; `noise` are marks round the answer that mean nothing."""

    opener: str
    closer: str
    noise: tuple[str, ...] = ()


class CallFrame(msgspec.Struct, frozen=True):
    """A call as this model writes it: `before` NAME `between` ARGUMENTS `after`."""

    before: str
    between: str
    after: str


# Hermes and Qwen write JSON in these tags, Qwen Coder and GLM tags; the body tells which.
HERMES = ToolSyntax(name="hermes", opener="<tool_call>", closer="</tool_call>", body="tags")
# Qwen Coder and Llama 3 at times leave the outer tag away.
FUNCTION = ToolSyntax(name="function", opener="<function=", closer="</function>", body="function")
MISTRAL = ToolSyntax(name="mistral", opener="[TOOL_CALLS]", body="named")
GRANITE = ToolSyntax(name="granite", opener="<|tool_call|>", closer="<|/tool_call|>")
PYTHON_TAG = ToolSyntax(name="llama3", opener="<|python_tag|>", body="python")
DEEPSEEK = ToolSyntax(
    name="deepseek",
    opener="<｜tool▁call▁begin｜>",
    closer="<｜tool▁call▁end｜>",
    body="deepseek",
    noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
KIMI = ToolSyntax(
    name="kimi",
    opener="<|tool_call_begin|>",
    closer="<|tool_call_end|>",
    body="kimi",
    noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
)
COMMAND_R = ToolSyntax(name="command-r", opener="<|START_ACTION|>", closer="<|END_ACTION|>")
GEMMA = ToolSyntax(name="gemma", opener="<|tool_call>call:", closer="<tool_call|>", body="gemma")
MINIMAX = ToolSyntax(
    name="minimax", opener="<minimax:tool_call>", closer="</minimax:tool_call>", body="invoke"
)
SYNTAXES = (
    HERMES,
    FUNCTION,
    MISTRAL,
    GRANITE,
    PYTHON_TAG,
    DEEPSEEK,
    KIMI,
    COMMAND_R,
    GEMMA,
    MINIMAX,
)

_HERMES_FRAME = CallFrame('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
_JSON_FRAME = CallFrame('{"name": "', '", "parameters": ', "}")
_FENCED_FRAME = CallFrame(
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
_NAMED_FRAME = CallFrame("[TOOL_CALLS]", "[ARGS]", "")
_FRAMES = {
    "mistral": CallFrame('[TOOL_CALLS] [{"name": "', '", "arguments": ', "}]"),
    "granite": CallFrame('<|tool_call|>[{"name": "', '", "arguments": ', "}]"),
    "deepseek": CallFrame(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi": CallFrame(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.",
        ":0<|tool_call_argument_begin|>",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "command-r": CallFrame(
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "',
        '", "parameters": ',
        "}]<|END_ACTION|>",
    ),
}

_THINKING = (
    ThinkingTags(opener="<think>", closer="</think>"),
    ThinkingTags(opener="[THINK]", closer="[/THINK]"),
    ThinkingTags(
        opener="<|START_THINKING|>",
        closer="<|END_THINKING|>",
        noise=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ThinkingTags(opener="<|channel>thought", closer="<channel|>"),
    ThinkingTags(opener="<seed:think>", closer="</seed:think>"),
    ThinkingTags(opener="Here is my thought process:", closer="Here is my response:"),
)
_RESPONSE_TAGS = ("<response>", "</response>")
HARMONY_MARKS = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's output is made of."""

    kind: Literal["tagged", "harmony"] = "tagged"
    thinking: ThinkingTags | None = None
    # How this model was taught to write calls; others are understood too.
    tool: ToolSyntax = HERMES
    # How a call is written when it has to be made.
    frame: CallFrame = _HERMES_FRAME
    # Calls are tags all the way down (Qwen Coder), instead of `frame`.
    tagged_calls: bool = False
    # Calls are bare JSON objects, at the beginning of the answer (Llama 3).
    bare_json: bool = False
    # The model's tokenizer has marks as control tokens: Submit.show_special must be set.
    show_special: bool = False

    @property
    def thinks(self) -> bool:
        """Whether the output may hold thoughts."""
        return self.thinking is not None or self.kind == "harmony"

    def opens_thinking(self, prompt: str) -> bool:
        """Whether a prompt ends inside a thought, so that the answer begins in it."""
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking.opener)


def choose_format(template: ChatTemplate, *, with_tools: bool = False) -> ChatFormat:
    """Return the format of a template's model; `with_tools` for a request that has tools."""
    used = template.for_tools() if with_tools else template
    if used.family == "harmony" or all(m in used.source for m in ("<|channel|>", "<|message|>")):
        return ChatFormat(kind="harmony", show_special=True)
    thinking = _thinking_tags(used)
    tool, bare_json = _tool_syntax(used)
    marks: list[str] = [tool.opener, tool.closer, *tool.noise] if with_tools else []
    if thinking is not None:
        marks += [thinking.opener, thinking.closer, *thinking.noise]
    return ChatFormat(
        thinking=thinking,
        tool=tool,
        frame=_frame(tool, used.traits.call_sample, bare_json=bare_json),
        tagged_calls="<function=" in used.traits.call_sample,
        bare_json=bare_json,
        show_special=any(used.has_control(mark) for mark in marks),
    )


def _thinking_tags(template: ChatTemplate) -> ThinkingTags | None:
    if not template.supports_thinking:
        return None
    shown = template.traits.thinking_sample + template.traits.prompt_end
    tags = (
        next((t for t in _THINKING if t.opener in shown or t.closer in shown), None)
        or next((t for t in _THINKING if t.opener in template.source), None)
        or next((t for t in _THINKING if t.closer in template.source), None)
    )
    if tags is not None and all(tag in template.source for tag in _RESPONSE_TAGS):
        return replace(tags, noise=_RESPONSE_TAGS)
    return tags


def _tool_syntax(template: ChatTemplate) -> tuple[ToolSyntax, bool]:
    """Return the syntax, and whether calls may be bare JSON."""
    sample = template.traits.call_sample
    for syntax in SYNTAXES:
        if syntax.opener in sample:
            return syntax, False
    if '{"name": "probe_tool"' in sample or '{"name":"probe_tool"' in sample:
        return PYTHON_TAG, True
    if template.traits.tools:
        for syntax in SYNTAXES:
            if syntax.opener in template.source:
                return syntax, syntax is PYTHON_TAG
    return HERMES, False


def _frame(tool: ToolSyntax, sample: str, *, bare_json: bool) -> CallFrame:
    """Return how a call is written; all parsers read the generic way too."""
    if bare_json:
        return _JSON_FRAME
    if tool is MISTRAL and "[ARGS]" in sample:
        return _NAMED_FRAME
    if tool is DEEPSEEK and "```json" in sample:
        return _FENCED_FRAME
    return _FRAMES.get(tool.name, _HERMES_FRAME)
