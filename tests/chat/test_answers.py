"""An answer that has to be JSON, or a call, can be nothing else; a thought may come first."""

from __future__ import annotations

import json

import pytest

from shimpy.chat.answers import call_answer, json_answer
from shimpy.chat.events import ContentDelta, ThinkingDelta
from shimpy.chat.formats import ChatFormat, ThinkingTags, choose_format
from shimpy.chat.gbnf import Rules, until
from shimpy.chat.messages import ToolCall, ToolSpec
from shimpy.chat.parser import make_parser
from shimpy.chat.template import ChatTemplate
from shimpy.errors import UserError
from tests.chat.real_grammar import Grammar, Vocabulary
from tests.chat.templates import ALL

TOOLS = [
    ToolSpec(
        name="get_x",
        parameters={
            "type": "object",
            "properties": {"x": {"type": "integer"}, "mode": {"enum": ["a", "b"]}},
            "required": ["x"],
        },
    ),
    ToolSpec(name="no_arguments", parameters={"type": "object", "properties": {}}),
]
TEMPLATES = {
    name: ChatTemplate.compile(source, control_tokens=tokens, bos_text="<s>", eos_text="</s>")
    for name, (source, tokens) in ALL.items()
}
THINKING = ChatFormat(thinking=ThinkingTags(opener="<think>", closer="</think>"))
HARMONY = ChatFormat(kind="harmony")


def accepts(vocabulary: Vocabulary, grammar: str, text: str) -> bool:
    with Grammar(vocabulary, grammar) as made:
        assert made.ok, grammar
        return made.accepts(text)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(2))
def test_a_call_that_has_to_be_made_is_one_that_the_parser_reads(
    vocabulary: Vocabulary, name: str, seed: int
) -> None:
    """The round trip of each family: template, format, grammar, llama.cpp, parser."""
    template = TEMPLATES[name]
    chosen = choose_format(template, with_tools=True)
    prompt = template.traits.prompt_end
    with Grammar(vocabulary, call_answer(chosen, TOOLS, prompt=prompt)) as grammar:
        assert grammar.ok
    if chosen.opens_thinking(prompt):
        # A random model would think for ever.
        prompt = ""
    grammar_text = call_answer(chosen, TOOLS, prompt=prompt, allow_thinking=False)
    with Grammar(vocabulary, grammar_text) as grammar:
        text = grammar.random_text(seed)
    assert text is not None
    parser = make_parser(chosen, tools=TOOLS, prompt=prompt)
    (call,) = [*parser.push(text), *parser.finish()]
    assert isinstance(call, ToolCall)
    assert call.name in ("get_x", "no_arguments")
    if call.name == "get_x":
        assert isinstance(call.arguments["x"], int)
        assert call.arguments.keys() <= {"x", "mode"}
    else:
        assert call.arguments == {}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen3", '<tool_call>\n{"name": "get_x", "arguments": {"x": 1}}\n</tool_call>'),
        (
            "qwen3-coder",
            (
                "<tool_call>\n<function=get_x>\n<parameter=x>\n1\n</parameter>\n"
                "</function>\n</tool_call>"
            ),
        ),
        ("llama31", '{"name": "get_x", "parameters": {"x": 1}}'),
        ("mistral-v7", '[TOOL_CALLS] [{"name": "get_x", "arguments": {"x": 1}}]'),
        ("magistral", '[TOOL_CALLS]get_x[ARGS]{"x": 1}'),
        ("granite33", '<|tool_call|>[{"name": "get_x", "arguments": {"x": 1}}]'),
        (
            "deepseek-r1",
            (
                "Hm.</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_x"
                '\n```json\n{"x": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
            ),
        ),
        (
            "deepseek-v31",
            (
                '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_x<｜tool▁sep｜>{"x": 1}'
                "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            ),
        ),
        (
            "gpt-oss",
            '<|channel|>commentary to=functions.get_x <|constrain|>json<|message|>{"x": 1}',
        ),
    ],
)
def test_a_call_is_written_as_its_family_writes_it(
    vocabulary: Vocabulary, name: str, written: str
) -> None:
    template = TEMPLATES[name]
    chosen = choose_format(template, with_tools=True)
    grammar = call_answer(chosen, TOOLS, prompt=template.traits.prompt_end)
    assert accepts(vocabulary, grammar, written)
    assert not accepts(vocabulary, grammar, "I would rather not.")
    assert not accepts(vocabulary, grammar, written.replace('"x"', '"y"').replace("=x", "=y"))


def test_texts_in_tags_are_free_and_other_values_by_their_schema(vocabulary: Vocabulary) -> None:
    parameters = {
        "$defs": {"n": {"type": "integer"}},
        "properties": {
            "text": {"type": "string"},
            "kind": {"type": "string", "enum": ["a", "b"]},
            "n": {"$ref": "#/$defs/n"},
        },
        "required": ["text"],
    }
    tool = ToolSpec(name="f", parameters=parameters)
    chat_format = ChatFormat(tagged_calls=True)
    grammar = call_answer(chat_format, [tool])

    def written(**values: str) -> str:
        tags = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        return f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>"

    text = written(text='def f():\n    "</par"', kind="b", n="7")
    assert accepts(vocabulary, grammar, text)
    parser = make_parser(chat_format, tools=[tool])
    (call,) = [*parser.push(text), *parser.finish()]
    assert isinstance(call, ToolCall)
    assert call.arguments == {"text": 'def f():\n    "</par"', "kind": "b", "n": 7}
    assert accepts(vocabulary, grammar, written(text=""))
    assert not accepts(vocabulary, grammar, written(kind="a"))
    assert not accepts(vocabulary, grammar, written(text="x", kind="c"))
    assert not accepts(vocabulary, grammar, written(text="x", n="seven"))
    with pytest.raises(UserError, match=r"'x' of the tool 'f'.*#/not"):
        call_answer(chat_format, [ToolSpec(name="f", parameters={"properties": {"x": {"not": 1}}})])


def test_a_named_tool_is_the_only_one() -> None:
    grammar = call_answer(ChatFormat(), TOOLS, name="get_x")
    assert "get_x" in grammar
    assert "no_arguments" not in grammar


def test_a_tool_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"'nope'.*get_x, no_arguments"):
        call_answer(ChatFormat(), TOOLS, name="nope")
    with pytest.raises(UserError, match="none"):
        call_answer(ChatFormat(), [])


def test_parameters_that_can_not_be_compiled_name_their_tool() -> None:
    tool = ToolSpec(name="odd", parameters={"properties": {"a": {"not": {}}}})
    with pytest.raises(UserError, match=r"'odd'.*#/properties/a/not"):
        call_answer(ChatFormat(), [tool])


def test_references_within_a_tools_parameters_are_its_own(vocabulary: Vocabulary) -> None:
    def tool(name: str, const: int) -> ToolSpec:
        parameters = {"$defs": {"d": {"const": const}}, "properties": {"a": {"$ref": "#/$defs/d"}}}
        return ToolSpec(name=name, parameters=parameters)

    grammar = call_answer(ChatFormat(), [tool("one", 1), tool("two", 2)])
    call = '<tool_call>\n{"name": "%s", "arguments": {"a": %d}}\n</tool_call>'
    assert accepts(vocabulary, grammar, call % ("one", 1))
    assert accepts(vocabulary, grammar, call % ("two", 2))
    assert not accepts(vocabulary, grammar, call % ("two", 1))


SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("chat_format", "prompt", "allowed", "refused"),
    [
        pytest.param(ChatFormat(), "", ['{"a":1}'], ['<think></think>{"a":1}', "{}"], id="plain"),
        pytest.param(
            THINKING,
            "",
            ['{"a":1}', '<think>\n</thin <b>\n</think>\n\n{"a":1}'],
            ["<think></think>", "<think>"],
            id="may think",
        ),
        pytest.param(
            THINKING, "<think>\n", ['Hm </think>\n\n{"a":1}'], ['{"a":1}'], id="is thinking"
        ),
        pytest.param(
            HARMONY,
            "<|start|>assistant",
            [
                '<|channel|>final<|message|>{"a":1}',
                '<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>{"a":1}',
            ],
            ['{"a":1}'],
            id="harmony",
        ),
        pytest.param(
            HARMONY,
            "<|start|>assistant<|channel|>final<|message|>",
            ['{"a":1}'],
            ['<|channel|>final<|message|>{"a":1}'],
            id="harmony, message open",
        ),
    ],
)
def test_json_comes_behind_the_thought(
    vocabulary: Vocabulary,
    chat_format: ChatFormat,
    prompt: str,
    allowed: list[str],
    refused: list[str],
) -> None:
    grammar = json_answer(chat_format, schema=SCHEMA, prompt=prompt)
    for text in allowed:
        assert accepts(vocabulary, grammar, text)
        parser = make_parser(chat_format, prompt=prompt)
        events = [*parser.push(text), *parser.finish()]
        assert ContentDelta('{"a":1}') in events
        assert all(isinstance(event, (ContentDelta, ThinkingDelta)) for event in events)
    for text in refused:
        assert not accepts(vocabulary, grammar, text)


def test_a_thought_can_be_ruled_out(vocabulary: Vocabulary) -> None:
    grammar = json_answer(THINKING, schema=SCHEMA, allow_thinking=False)
    assert not accepts(vocabulary, grammar, '<think></think>{"a":1}')
    grammar = json_answer(HARMONY, schema=SCHEMA, allow_thinking=False)
    assert "analysis" not in grammar


def test_without_a_schema_any_object_will_do(vocabulary: Vocabulary) -> None:
    grammar = json_answer(ChatFormat())
    assert accepts(vocabulary, grammar, json.dumps({"a": [1, {"b": None}]}))
    assert not accepts(vocabulary, grammar, "[1]")


@pytest.mark.parametrize("closer", ["</think>", "aab", "abab", "x"])
def test_text_up_to_a_mark_ends_at_the_first(vocabulary: Vocabulary, closer: str) -> None:
    rules = Rules()
    rules.set_root(until(rules, closer))
    for before in ("", "a", "aa", "aba", "</thin", "<</", "日"):
        text = before + closer
        first_ends_it = text.index(closer) + len(closer) == len(text)
        assert accepts(vocabulary, rules.text(), text) == first_ends_it
        assert not accepts(vocabulary, rules.text(), text + "z")
        assert not accepts(vocabulary, rules.text(), text[:-1])
