from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.chat.messages import ChatMessage
from shimpy.chat.template import ChatTemplate
from shimpy.errors import InvalidOptionError
from shimpy.server.ollama.gotemplate import is_go_template, to_jinja
from tests.server.test_bodies import busy

CHATML = """{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>"""

LLAMA3 = """{{- range .Messages }}<|start|>{{ .Role }}

{{ .Content }}<|eot|>
{{- if eq .Role "user" "tool" }}!{{ else if eq .Role "x" }}?{{ end }}
{{- end }}{{/* the answer */}}<|start|>assistant"""


def _render(template: str, *messages: tuple[str, str]) -> str:
    compiled = ChatTemplate.compile(to_jinja(template), strict=True)
    conversation = [ChatMessage(role=role, content=text) for role, text in messages]  # type: ignore[arg-type]
    return compiled.render(conversation, now=datetime(2026, 1, 1, tzinfo=UTC)).text


def test_prompt_and_system() -> None:
    assert _render(CHATML, ("system", "S"), ("user", "P")) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
    )
    assert _render(CHATML, ("user", "P")) == (
        "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_with_conditions() -> None:
    assert _render(LLAMA3, ("user", "a"), ("assistant", "b")) == (
        "<|start|>user\n\na<|eot|>!<|start|>assistant\n\nb<|eot|><|start|>assistant"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("[{{ .Prompt }}]", "[P]"),
        ("[ {{- .Prompt -}} ]", "[P]"),
        ("{{ .Prompt }}{{ if and .System .Prompt }}y{{ else }}n{{ end }}", "Pn"),
        ("{{ .Prompt }}{{ if not .System }}y{{ end }}", "Py"),
        ("{{ .Prompt }}{{ if (or .System (eq .Prompt `P`)) }}y{{ end }}", "Py"),
        ('{{ .Prompt }}{{ "a\\n\\"b" }}', 'Pa\n"b'),
        ("{{ .Prompt }}{% raw %}\n", "P{% raw %}\n"),
        ("{{ $.Prompt }} {{ len .Messages }}", "P 1"),
        ("{{ if .Prompt }}{{ .Prompt }}{{ .Response }}{{ else }}z{{ end }}z", "P"),
    ],
)
def test_expressions(template: str, expected: str) -> None:
    assert _render(template, ("user", "P")) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ .Tools }}",
        "{{ range .Tools }}{{ end }}",
        "{{ if .Prompt }}",
        "{{ end }}",
        "{{ else }}",
        "{{ .Prompt .System }}",
        "{{ (.Prompt }}",
        "{{ .Prompt) }}",
        "{{ eq .Prompt }}",
        "{{ }}",
        "{{ .Role }}",
        "{{ if }}x{{ end }}",
        "{{ $x := .Prompt }}",
    ],
)
def test_what_is_not_understood_is_refused(template: str) -> None:
    with pytest.raises(InvalidOptionError, match="template"):
        to_jinja(template)


def test_the_languages_are_told_apart() -> None:
    assert is_go_template("{{ .Prompt }}")
    assert is_go_template("{{- if .System }}x{{ end }}")
    assert not is_go_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not is_go_template("{{ messages[0].content }}")


@busy
@given(st.lists(st.sampled_from(["{{", "}}", "-", " ", ".Prompt", "(", ")", '"', "if", "eq", "x"])))
def test_any_text_is_translated_or_refused(parts: list[str]) -> None:
    try:
        source = to_jinja("".join(parts))
    except InvalidOptionError:
        return
    assert source
