"""What a model writes is split into thoughts, content and calls, however it is cut up."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shimpy.chat.events import ContentDelta, OutputEvent, ThinkingDelta, merge
from shimpy.chat.formats import (
    COMMAND_R,
    DEEPSEEK,
    GEMMA,
    GRANITE,
    KIMI,
    MINIMAX,
    MISTRAL,
    PYTHON_TAG,
    SYNTAXES,
    ChatFormat,
    ThinkingTags,
)
from shimpy.chat.messages import ToolCall, ToolSpec
from shimpy.chat.parser import make_parser

TOOLS = [
    ToolSpec(
        name="f",
        parameters={
            "type": "object",
            "properties": {"x": {"type": "string"}, "n": {"type": "integer"}, "o": {}},
        },
    ),
    ToolSpec(name="g", parameters={}),
]
THINK = ThinkingTags(opener="<think>", closer="</think>")
PLAIN = ChatFormat()
THINKING = ChatFormat(thinking=THINK)
LLAMA = ChatFormat(tool=PYTHON_TAG, bare_json=True)
HARMONY = ChatFormat(kind="harmony")
HARMONY_PROMPT = "<|start|>user<|message|>x<|end|><|start|>assistant"


def parse(
    chat_format: ChatFormat,
    pieces: Sequence[str],
    *,
    tools: Sequence[ToolSpec] = TOOLS,
    prompt: str = "",
    split_thinking: bool = True,
) -> list[OutputEvent]:
    parser = make_parser(chat_format, tools=tools, prompt=prompt, split_thinking=split_thinking)
    events = [event for piece in pieces for event in parser.push(piece)]
    return merge([*events, *parser.finish()])


def f(number: int = 0, **arguments: object) -> ToolCall:
    return ToolCall(id=f"call_{number}", name="f", arguments=arguments)


def g(number: int = 0) -> ToolCall:
    return ToolCall(id=f"call_{number}", name="g", arguments={})


# Format, output, and what it means.
CASES: dict[str, tuple[ChatFormat, str, list[OutputEvent]]] = {
    "words": (PLAIN, "Just words. \n", [ContentDelta("Just words. \n")]),
    "hermes": (
        PLAIN,
        'Sure. \n<tool_call>\n{"name": "f", "arguments": {"x": "a", "n": 3}}\n</tool_call>',
        [ContentDelta("Sure."), f(x="a", n=3)],
    ),
    "hermes, two": (
        PLAIN,
        (
            '<tool_call>\n{"name": "f", "arguments": {"x": "a"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call> Done.'
        ),
        [f(x="a"), g(1), ContentDelta("Done.")],
    ),
    "hermes, the mark in a string": (
        PLAIN,
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>\\"}"}}</tool_call>',
        [f(x='</tool_call>"}')],
    ),
    "hermes, not closed": (
        PLAIN,
        '<tool_call>\n{"name": "f", "arguments": {"x": "a"}}',
        [f(x="a")],
    ),
    "hermes, arguments as text": (
        PLAIN,
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": \\"a\\"}"}</tool_call>',
        [f(x="a")],
    ),
    "hermes, as OpenAI writes it": (
        PLAIN,
        '<tool_call>{"function": {"name": "f", "arguments": {"x": "a"}}}</tool_call>',
        [f(x="a")],
    ),
    "hermes, a raw line break": (
        PLAIN,
        '<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>',
        [f(x="a\nb")],
    ),
    "qwen coder": (
        PLAIN,
        (
            "<tool_call>\n<function=f>\n<parameter=x>\n12\n</parameter>\n<parameter=n>\n12\n"
            "</parameter>\n<parameter=o>\n[1]\n</parameter>\n</function>\n</tool_call>"
        ),
        [f(x="12", n=12, o=[1])],
    ),
    "qwen coder, outer tag forgotten": (
        PLAIN,
        "ok\n<function=f>\n<parameter=x>\na\n  b\n</parameter>\n</function>\n</tool_call> end",
        [ContentDelta("ok"), f(x="a\n  b"), ContentDelta("end")],
    ),
    "qwen coder, no parameters": (
        PLAIN,
        "<tool_call>\n<function=g>\n</function>\n</tool_call>",
        [g()],
    ),
    "function with JSON": (PLAIN, '<function=f>{"x": "a"}</function>', [f(x="a")]),
    "glm": (
        PLAIN,
        (
            "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n"
            "<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
        ),
        [f(x="1", n=1)],
    ),
    "glm, no arguments": (PLAIN, "<tool_call>g</tool_call>", [g()]),
    "mistral, array": (
        ChatFormat(tool=MISTRAL),
        (
            '[TOOL_CALLS] [{"name": "f", "arguments": {"x": "]"}, "id": "abcdefghi"}, '
            '{"name": "g", "arguments": {}}]'
        ),
        [f(x="]"), g(1)],
    ),
    "mistral, named": (
        ChatFormat(tool=MISTRAL),
        'Hm.[TOOL_CALLS]f[ARGS]{"x": "}"}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}',
        [ContentDelta("Hm."), f(x="}"), g(1)],
    ),
    "mistral, named without mark": (
        ChatFormat(tool=MISTRAL),
        '[TOOL_CALLS]f{"x": "a"}',
        [f(x="a")],
    ),
    "deepseek, fenced": (
        ChatFormat(tool=DEEPSEEK),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
            '{"x": "{}"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n'
            "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        [f(x="{}"), g(1)],
    ),
    "deepseek, short": (
        ChatFormat(tool=DEEPSEEK),
        (
            "ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
            '{"x": "a"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        ),
        [ContentDelta("ok"), f(x="a")],
    ),
    "granite": (
        ChatFormat(tool=GRANITE),
        '<|tool_call|>[{"name": "f", "arguments": {"x": "a"}}, {"name": "g", "arguments": {}}]',
        [f(x="a"), g(1)],
    ),
    "kimi": (
        ChatFormat(tool=KIMI),
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
            '<|tool_call_argument_begin|>{"x": "a"}<|tool_call_end|><|tool_calls_section_end|>'
        ),
        [f(x="a")],
    ),
    "command-r": (
        ChatFormat(tool=COMMAND_R),
        (
            '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"x": "a"}}]'
            "<|END_ACTION|>"
        ),
        [f(x="a")],
    ),
    "gemma": (
        ChatFormat(tool=GEMMA),
        '<|tool_call>call:f{x:<|"|>a{b:"c"<|"|>,n:3,o:{a:[1,true,null],b:<|"|><|"|>}}<tool_call|>',
        [f(x='a{b:"c"', n=3, o={"a": [1, True, None], "b": ""})],
    ),
    "minimax": (
        ChatFormat(tool=MINIMAX),
        (
            '<minimax:tool_call>\n<invoke name="f">\n<parameter name="n">3</parameter>\n</invoke>\n'
            "</minimax:tool_call>"
        ),
        [f(n=3)],
    ),
    "llama, bare": (LLAMA, ' {"name": "f", "parameters": {"x": "a"}}', [f(x="a")]),
    "llama, several": (
        LLAMA,
        '{"name": "f", "parameters": {"x": "a"}}; {"name": "g", "parameters": {}}',
        [f(x="a"), g(1)],
    ),
    "llama, an unknown tool": (
        LLAMA,
        '{"name": "h", "parameters": {}}',
        [ContentDelta('{"name": "h", "parameters": {}}')],
    ),
    "llama, other JSON": (LLAMA, '{"answer": 1}', [ContentDelta('{"answer": 1}')]),
    "llama, JSON after words": (
        LLAMA,
        'So: {"name": "f", "parameters": {}}',
        [ContentDelta('So: {"name": "f", "parameters": {}}')],
    ),
    "llama, python tag": (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"n": 1}}', [f(n=1)]),
    "llama, built in": (LLAMA, '<|python_tag|>f.call(x="a, b", n=3)', [f(x="a, b", n=3)]),
    "llama, code": (LLAMA, "<|python_tag|>print(1)", [ContentDelta("<|python_tag|>print(1)")]),
    "thought": (
        THINKING,
        "<think>\nHm, <b>, </th.\n\n</think>\n\nYes.",
        [ThinkingDelta("Hm, <b>, </th."), ContentDelta("Yes.")],
    ),
    "thought and call": (
        THINKING,
        '<think>Hm.</think>\n\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        [ThinkingDelta("Hm."), g()],
    ),
    "thought without end": (THINKING, "<think>Hm </thi", [ThinkingDelta("Hm </thi")]),
    "empty thought": (THINKING, "<think>\n\n</think>\n\nYes.", [ContentDelta("Yes.")]),
    "a tag in the answer": (
        THINKING,
        "Use <think> and </think>.",
        [ContentDelta("Use <think> and </think>.")],
    ),
    "response tags": (
        ChatFormat(thinking=replace(THINK, noise=("<response>", "</response>"))),
        "<think>Hm.</think><response>Yes.</response>",
        [ThinkingDelta("Hm."), ContentDelta("Yes.")],
    ),
    "harmony": (
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        [ThinkingDelta("Hm."), ContentDelta("Yes.")],
    ),
    "harmony, call": (
        HARMONY,
        (
            "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
            '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": "a"}<|call|>'
        ),
        [ContentDelta("Let me see."), f(x="a")],
    ),
    "harmony, recipient first": (
        HARMONY,
        ' to=functions.f<|channel|>commentary json<|message|>{"x": "a"}',
        [f(x="a")],
    ),
    "harmony, two calls": (
        HARMONY,
        (
            "<|channel|>commentary to=functions.g<|message|>{}<|call|><|start|>assistant"
            '<|channel|>commentary to=functions.f<|message|>{"x": "a"}<|call|>'
        ),
        [g(), f(1, x="a")],
    ),
    "harmony, header forgotten": (HARMONY, "Just words.", [ContentDelta("Just words.")]),
    "harmony, words like a header": (HARMONY, "assistant?", [ContentDelta("assistant?")]),
    "harmony, header cut off": (HARMONY, "<|channel|>ana", []),
}
# Output that only looks like a call: it must come out as it went in.
MALFORMED = {
    "in prose": "Write <tool_call> before and </tool_call> behind.",
    "no JSON": "<tool_call>\nnot a call\n</tool_call>",
    "broken JSON": '<tool_call>{"name": "f", "arguments": {]}</tool_call>',
    "no name": '<tool_call>\n{"arguments": {"x": "a"}}\n</tool_call>',
    "arguments are a list": '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    "cut off": '<tool_call>\n{"name": "f", "argu',
    "cut off in the mark": "Well <tool_ca",
    "empty": "<tool_call></tool_call>",
    "a number that is none": '<tool_call>{"name": "f", "arguments": {"n": NaN}}</tool_call>',
    "function without end": "<function=f",
    "a function's name in prose": "<function= is how it begins",
    "mistral in prose": "The mark [TOOL_CALLS] is what",
    "mistral, no arguments": "[TOOL_CALLS]f[ARGS]",
    "python tag alone": "<|python_tag|>",
    "gemma, broken": "<|tool_call>call:f{x:<tool_call|>",
    "kimi, broken": "<|tool_call_begin|>f<|tool_call_end|>",
}


def outcomes(text: str) -> st.SearchStrategy[list[str]]:
    """All ways to cut a text up."""
    cuts = st.lists(st.integers(0, len(text)), max_size=12)
    return cuts.map(
        lambda at: [
            text[a:b] for a, b in zip([0, *sorted(at)], [*sorted(at), len(text)], strict=True)
        ]
    )


@pytest.mark.parametrize("name", CASES)
def test_each_format_is_understood(name: str) -> None:
    chat_format, text, expected = CASES[name]
    assert parse(chat_format, [text], prompt=HARMONY_PROMPT) == expected


@pytest.mark.parametrize("name", CASES)
def test_letter_by_letter_means_the_same(name: str) -> None:
    chat_format, text, expected = CASES[name]
    assert parse(chat_format, list(text), prompt=HARMONY_PROMPT) == expected


@given(data=st.data(), name=st.sampled_from(sorted(CASES)))
def test_however_the_text_is_cut_it_means_the_same(data: st.DataObject, name: str) -> None:
    chat_format, text, expected = CASES[name]
    pieces = data.draw(outcomes(text))
    assert parse(chat_format, pieces, prompt=HARMONY_PROMPT) == expected


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_call_is_content_to_the_letter(name: str) -> None:
    text = MALFORMED[name]
    assert parse(PLAIN, [text]) == [ContentDelta(text)]
    assert parse(PLAIN, list(text)) == [ContentDelta(text)]


MARKS = sorted(
    {mark for syntax in SYNTAXES for mark in (syntax.opener, syntax.closer, *syntax.noise) if mark}
    | {"<think>", "</think>", "{", "}", '"name"', ": ", '"f"', '"arguments"', "[ARGS]", "f", ">"}
    | {"<|channel|>", "<|message|>", "<|start|>", "<|end|>", "analysis", "final", " to=functions.f"}
    | {"\n", "  ", "words", "<", "|"}
)
FORMATS = {
    "plain": PLAIN,
    "thinking": THINKING,
    "llama": LLAMA,
    "mistral": ChatFormat(tool=MISTRAL, thinking=ThinkingTags(opener="[THINK]", closer="[/THINK]")),
    "deepseek": ChatFormat(tool=DEEPSEEK, thinking=THINK),
    "harmony": HARMONY,
}
output = st.lists(st.sampled_from(MARKS), max_size=14).map("".join)


@given(data=st.data(), text=output, name=st.sampled_from(sorted(FORMATS)), opened=st.booleans())
def test_any_output_means_the_same_however_it_is_cut(
    data: st.DataObject, text: str, name: str, opened: bool
) -> None:
    chat_format = FORMATS[name]
    prompt = "<think>" if opened else ""
    whole = parse(chat_format, [text], prompt=prompt)
    assert parse(chat_format, data.draw(outcomes(text)), prompt=prompt) == whole


@given(text=output)
def test_no_word_of_an_answer_is_lost_or_said_twice(text: str) -> None:
    """Where nothing is a whole call, the content is the text."""
    events = parse(PLAIN, [text])
    if not any(isinstance(event, ToolCall) for event in events):
        said = "".join(event.text for event in events if isinstance(event, ContentDelta))
        assert said == text


@given(text=output, name=st.sampled_from(sorted(FORMATS)))
def test_letters_are_neither_lost_nor_made_up(text: str, name: str) -> None:
    """But for marks and the space round them; words never vanish."""
    events = parse(FORMATS[name], [text])
    written = "".join(
        json.dumps([event.name, dict(event.arguments)])
        if isinstance(event, ToolCall)
        else event.text
        for event in events
    )
    assert written.count("words") == text.count("words")


def test_words_are_passed_on_at_once() -> None:
    parser = make_parser(THINKING, tools=TOOLS)
    assert parser.push("Hello") == [ContentDelta("Hello")]
    assert parser.push(" wor") == [ContentDelta(" wor")]
    assert parser.push("ld <") == [ContentDelta("ld")]
    assert parser.push("b>") == [ContentDelta(" <b>")]


def test_a_thought_is_passed_on_at_once() -> None:
    parser = make_parser(THINKING, tools=TOOLS)
    assert parser.push("<think>") == []
    assert parser.push("\nWell") == [ThinkingDelta("Well")]
    assert parser.push(" </th") == []
    assert parser.push("ere") == [ThinkingDelta(" </there")]


def test_json_that_is_no_call_is_passed_on_as_soon_as_that_is_certain() -> None:
    parser = make_parser(LLAMA, tools=TOOLS)
    assert parser.push('{"na') == []
    assert parser.push('rrow": 1') == [ContentDelta('{"narrow": 1')]


def test_a_call_comes_as_soon_as_it_is_whole() -> None:
    parser = make_parser(PLAIN, tools=TOOLS)
    assert parser.push('<tool_call>{"name": "g", "arguments": {}}') == [g()]


def test_an_answer_may_begin_inside_the_thought_that_the_prompt_opens() -> None:
    for text in ("Hm.\n</think>\n\nYes.", "<think>\nHm.</think>Yes."):
        events = parse(THINKING, [text], prompt="<｜Assistant｜><think>\n")
        assert events == [ThinkingDelta("Hm."), ContentDelta("Yes.")]


def test_an_answer_may_go_on_in_the_message_that_the_prompt_opens() -> None:
    prompt = HARMONY_PROMPT + "<|channel|>final<|message|>Once"
    assert parse(HARMONY, [" upon"], prompt=prompt) == [ContentDelta(" upon")]
    prompt = HARMONY_PROMPT + "<|channel|>analysis<|message|>Once"
    assert parse(HARMONY, [" upon"], prompt=prompt) == [ThinkingDelta(" upon")]


def test_without_tools_nothing_is_a_call() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert parse(PLAIN, [text], tools=()) == [ContentDelta(text)]
    text = '{"name": "f", "parameters": {}}'
    assert parse(LLAMA, [text], tools=()) == [ContentDelta(text)]


def test_thoughts_can_stay_in_the_content() -> None:
    text = "<think>Hm.</think> Yes."
    assert parse(THINKING, [text], split_thinking=False) == [ContentDelta(text)]


def test_ids_count_up_behind_what_they_are_given() -> None:
    parser = make_parser(PLAIN, tools=TOOLS, call_id="abc")
    text = '<tool_call>{"name": "g"}</tool_call>' * 2
    assert [event.id for event in parser.push(text) if isinstance(event, ToolCall)] == [
        "abc0",
        "abc1",
    ]


def test_lone_surrogates_in_arguments_are_replaced() -> None:
    """No client could be sent them."""
    text = '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>'
    assert parse(PLAIN, [text]) == [f(x="?")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 20_000,
        "<tool_call>{" * 10_000,
        '<tool_call>{"a": "' + "<tool_call>" * 10_000,
        "<tool_call>" + " " * 100_000,
        "[TOOL_CALLS]" + " " * 100_000,
        "<function=f>" + "<parameter=x>" * 10_000,
        "<|tool_call>call:f{" + "a" * 100_000,
        '<|python_tag|>f.call(x="' + "a=" * 50_000,
        "<tool_call><function=f>" + "<parameter=x>" * 10_000 + "</tool_call>",
        "[" * 100_000,
        '<tool_call>{"name": "f", "arguments": ' + "[" * 50_000 + "]" * 50_000 + "}</tool_call>",
    ],
    ids=range(11),
)
def test_no_output_takes_long_to_parse(text: str) -> None:
    """The whole of it would hang the daemon where a step was quadratic."""
    pieces = [text[i : i + 200] for i in range(0, len(text), 200)]
    events = parse(PLAIN, pieces)
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)).strip()
