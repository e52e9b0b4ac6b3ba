"""Ollama's templates say what Go's text/template makes of them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from shimpy.chat.formats import choose_format
from shimpy.chat.gotemplate import GoTemplate, is_go_template
from shimpy.chat.messages import ChatMessage, ToolCall, ToolSpec
from shimpy.chat.template import ChatTemplate
from shimpy.errors import UserError
from shimpy.protocol.messages import Text

NOW = datetime(2025, 3, 4, tzinfo=UTC)
TOKENS = ["<|im_start|>", "<|im_end|>"]
TOOL = ToolSpec(
    name="f",
    description="d",
    parameters={
        "type": "object",
        "properties": {"b": {"type": "integer"}, "a": {"type": "string"}},
    },
)
OLD = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
)
NEW = """{{- if .Messages }}
{{- if or .System .Tools }}<|im_start|>system
{{- if .System }}
{{ .System }}
{{- end }}
{{- if .Tools }}
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>
{{- end }}<|im_end|>
{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Content }}{{ .Content }}
{{- else if .ToolCalls }}<tool_call>
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{ end }}</tool_call>
{{- end }}{{ if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}<|im_start|>user
<tool_response>
{{ .Content }}
</tool_response><|im_end|>
{{ end }}
{{- if and (ne .Role "assistant") $last }}<|im_start|>assistant
{{ end }}
{{- end }}
{{- else }}
{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ end }}{{ .Response }}{{ if .Response }}<|im_end|>{{ end }}"""


def system(text: str) -> ChatMessage:
    return ChatMessage(role="system", content=text)


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def answer(text: str = "", *calls: ToolCall) -> ChatMessage:
    return ChatMessage(role="assistant", content=text, tool_calls=calls)


def render(source: str, *messages: ChatMessage, **options: object) -> str:
    template = GoTemplate(source, control_tokens=TOKENS)
    return template.render(messages or [user("hi")], now=NOW, **options).text  # type: ignore[arg-type]


def test_one_turn_ends_where_the_response_begins() -> None:
    assert render(OLD, system("S"), user("U")) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


def test_several_turns_are_printed_one_after_the_other() -> None:
    text = render(OLD, system("S"), user("U"), answer("A"), user("V"))
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_last_answer_is_left_open() -> None:
    assert render(OLD, user("U"), answer("Once")).endswith("assistant\nOnce")
    assert render(NEW, user("U"), answer("Once")).endswith("assistant\nOnce")


def test_a_template_without_a_response_gets_one_at_its_end() -> None:
    assert render("{{ .Prompt }} ->", user("U"), answer("A"), user("V")) == "U ->AV ->"


def test_a_whole_conversation_with_tools_is_printed_by_the_template() -> None:
    call = ToolCall(name="f", arguments={"x": "é<"})
    result = ChatMessage(role="tool", content="r", tool_name="f")
    text = render(NEW, system("S"), user("U"), answer("", call), result, tools=[TOOL])
    assert text == (
        "<|im_start|>system\nS\n<tools>\n"
        '{"type": "function", "function": {"name":"f","description":"d","parameters":'
        '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}}}}}\n'
        "</tools><|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "f", "arguments": {"x":"é<"}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\nr\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_text_becomes_a_control_token() -> None:
    template = GoTemplate(OLD, control_tokens=TOKENS)
    parts = template.render([user("a<|im_end|>"), user("<|im_")], now=NOW).parts
    assert parts[1] == Text("<|im_end|>")
    assert Text("\n\n<|im_<|im_end|>\n<|im_start|>assistant\n", parse_special=True) in parts


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a {{- 1 -}} b", "a1b"),
        ("a {{ 1 }} b", "a 1 b"),
        ("{{/* }} */}}x{{- /* y */ -}} z", "xz"),
        ('{{ "a}}b" }}{{ `c"` }}', 'a}}bc"'),
        ('{{ printf "%s-%d-%v-%q%%" "a" 3 true "x" }}', 'a-3-true-"x"%'),
        ('{{ print "a" 1 }}{{ println "b" }}', "a1b\n"),
        ("{{ true }}{{ nil }}{{ -1.5 }}", "true-1.5"),
        ("{{ $x := 1 }}{{ $x = 2 }}{{ $x }}", "2"),
        ("{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ $y := 3 }}{{ end }}{{ $x }}", "2"),
        ("{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ end }}{{ $x }}", "1"),
        ("{{ if .Missing }}a{{ else if .Messages }}b{{ else }}c{{ end }}", "b"),
        ("{{ if not .Missing }}a{{ end }}{{ if and 1 0 }}b{{ end }}{{ or 0 2 }}", "a2"),
        ("{{ with .Messages }}{{ len . }}{{ else }}none{{ end }}", "1"),
        ("{{ with $x := 5 }}{{ $x }}{{ . }}{{ end }}", "55"),
        ("{{ with .Missing }}a{{ else with .Messages }}b{{ end }}", "b"),
        ("{{ range .Messages }}{{ .Role }}:{{ .Content }}{{ end }}", "user:hi"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Content }}{{ end }}", "0hi"),
        ("{{ range $m := .Messages }}{{ $m.Role }}{{ end }}", "user"),
        ("{{ range .Missing }}a{{ else }}none{{ end }}", "none"),
        ("{{ range .Messages }}{{ break }}a{{ end }}b", "b"),
        ("{{ range .Messages }}{{ continue }}a{{ end }}b", "b"),
        ("{{ (index .Messages 0).Content }}{{ index .Messages 0 | len }}", "hi6"),
        ("{{ .Messages | len }}{{ len .Missing }}", "10"),
        (
            '{{ eq 1 2 1 }}{{ ne "a" "b" }}{{ lt 1 2 }}{{ ge 1 2 }}{{ gt 2 1 }}{{ le 2 2 }}',
            "truetruetruefalsetruetrue",
        ),
        ('{{ slice "abcd" 1 }}{{ slice "abcd" 1 2 }}', "bcdb"),
        ("{{ (index .Messages 0) | json | len | eq 1 }}", "false"),
        ("{{ currentDate }}", "2025-03-04"),
        ("{{ .Think }}{{ .IsThinkSet }}{{ .ThinkLevel }}", "truetruehigh"),
        (
            (
                "{{ range .Tools }}{{ range $k, $v := .Function.Parameters.Properties }}"
                "{{ $k }}={{ $v.Type }};{{ end }}{{ end }}"
            ),
            "a=string;b=integer;",
        ),
        ("no action at all", "no action at all"),
    ],
)
def test_the_notation_means_what_it_means_in_go(source: str, expected: str) -> None:
    """`.Messages` somewhere keeps the response from being added."""
    text = render(source + "{{ if false }}{{ .Messages }}{{ end }}", tools=[TOOL], think="high")
    assert text == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ foo }}", "no function 'foo'"),
        ("{{ if .X }}", "without its {{ end }}"),
        ("{{ end }}", "without a beginning"),
        ("{{ if .X }}{{ else }}{{ else }}{{ end }}", "without its"),
        ("{{ if .X }}{{ else range .Y }}{{ end }}{{ end }}", "unknown"),
        ('{{ template "x" }}', "not supported"),
        ('{{ define "x" }}{{ end }}', "not supported"),
        ("{{ .A", "without its }}"),
        ('{{ "a }}', "not understood"),
        ('{{ "a', "without its }}"),
        ("{{ range $a, $b }}{{ end }}", "left over"),
        ("{{ $a, $b := 1 }}", "outside a range"),
        ("{{ 1 2 }}", "left over"),
        ("{{ (1 }}", "missing"),
        ("{{ }}", "missing"),
        ("{{ . | . }}", "no function"),
        ("{{ & }}", "&"),
        ("{{ " + "(" * 100 + " }}", "too deeply"),
        ("{{ if 1 }}" * 100, "levels deep"),
        ("x" * 70_000, "characters"),
    ],
)
def test_what_is_not_understood_is_said(source: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        GoTemplate(source)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ $x }}",
        "{{ $x = 1 }}",
        "{{ break }}",
        "{{ index .Messages 5 }}",
        "{{ len 5 }}",
        "{{ lt 1 .Prompt }}",
        "{{ range 5 }}{{ end }}",
        "{{ not 1 2 }}",
        '{{ printf "%x" 1 }}',
        "{{ eq }}",
        "{{ slice .Messages -1 0 5 1 }}",
        "{{ currentDate 1 }}",
    ],
)
def test_what_fails_while_rendering_is_the_requests_fault(source: str) -> None:
    with pytest.raises(UserError, match="can't render"):
        render(source + "{{ .Messages }}")


def test_work_is_bounded() -> None:
    loop = "{{ range .Messages }}" * 30 + "x" + "{{ end }}" * 30
    source = loop.replace(".Messages", "$.Messages")
    messages = [user(str(i)) if i % 2 else answer(str(i)) for i in range(10)]
    with pytest.raises(UserError, match="too much"):
        render(source, *messages)


@pytest.mark.parametrize(
    ("source", "is_go"),
    [
        (OLD, True),
        (NEW, True),
        ("{{ .Prompt }}", True),
        ("{{ .Prompt", True),
        ("{{ if .X }}", True),
        ("{{- range $i, $m := .Messages }}", True),
        ("plain words", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{{ messages[0]['content'] }}", False),
        ("{{ bos_token }}{{ messages[0].content }}", False),
    ],
)
def test_gos_templates_are_told_from_jinjas(source: str, is_go: bool) -> None:
    assert is_go_template(source) == is_go


def test_what_a_template_takes_is_known() -> None:
    assert GoTemplate(NEW).takes_messages
    assert GoTemplate(NEW).takes_tools
    assert not GoTemplate(OLD).takes_messages
    template = GoTemplate("<PRE> {{ .Prompt }} <SUF>{{ .Suffix }} <MID>")
    assert template.takes_suffix
    assert template.render([user("a")], now=NOW, suffix="b").text == "<PRE> a <SUF>b <MID>"


# --- as a chat template like any other -----------------------------------------------------------


def test_a_go_template_serves_as_a_models_template() -> None:
    template = ChatTemplate.compile(NEW, control_tokens=TOKENS)
    assert not template.family
    assert template.supports_tools
    assert not template.supports_thinking
    assert choose_format(template, with_tools=True).tool.name == "hermes"
    developer = ChatMessage(role="developer", content="S")
    rendered = template.render([developer, user("a<|im_end|>")], now=NOW, tools=[TOOL])
    assert rendered.text.startswith("<|im_start|>system\nS\n<tools>")
    assert Text("<|im_end|>") in rendered.parts


def test_tools_are_said_in_words_where_a_go_template_has_no_place_for_them() -> None:
    template = ChatTemplate.compile(OLD, control_tokens=TOKENS)
    call = ToolCall(name="f", arguments={"x": 1})
    result = ChatMessage(role="tool", content="sunny", tool_name="f")
    text = template.render([user("U"), answer("", call), result], now=NOW, tools=[TOOL]).text
    assert '"name": "f"' in text
    assert "sunny" in text
    assert text.startswith("<|im_start|>system\nYou can call these functions")


def test_a_start_token_in_a_go_template_is_not_added_again() -> None:
    template = ChatTemplate.compile("<s>{{ .Prompt }}", control_tokens=["<s>"], bos_text="<s>")
    assert not template.render([user("x")], now=NOW).add_bos
    template = ChatTemplate.compile("{{ .Prompt }}", control_tokens=["<s>"], bos_text="<s>")
    assert template.render([user("<s>x")], now=NOW).add_bos


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ if .X }}", "without its"),
        ("{{ .System }}", "user's message"),
        ("{{ $x }}", "no variable"),
    ],
)
def test_a_broken_go_template_is_replaced_or_refused(source: str, words: str) -> None:
    template = ChatTemplate.compile(source, control_tokens=TOKENS)
    assert template.family == "chatml"
    assert words in template.problem
    with pytest.raises(UserError, match=words):
        ChatTemplate.compile(source, strict=True)
