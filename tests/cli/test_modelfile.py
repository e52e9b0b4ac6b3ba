from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.cli.modelfile import parse_modelfile
from shimpy.errors import UserError

WHOLE = '''# A pirate.
FROM  qwen3:8b
from ./mmproj.gguf

PARAMETER temperature 0.6
parameter stop "<|im_start|>"
PARAMETER stop \\n\\nUser:
PARAMETER num_ctx 8192
PARAMETER use_mmap false
SYSTEM """You are a pirate.

Say "Ahoy"."""
TEMPLATE "{{ .System }} {{ .Prompt }}"
MESSAGE user Who are you?
MESSAGE assistant """A pirate.
"""
LICENSE MIT
license """Second
licence"""
'''


def test_every_command_is_read() -> None:
    parts = parse_modelfile(WHOLE)
    assert parts.sources == ["qwen3:8b", "./mmproj.gguf"]
    assert parts.request() == {
        "parameters": {
            "temperature": 0.6,
            "stop": ["<|im_start|>", "\n\nUser:"],
            "num_ctx": 8192,
            "use_mmap": False,
        },
        "system": 'You are a pirate.\n\nSay "Ahoy".',
        "template": "{{ .System }} {{ .Prompt }}",
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "A pirate.\n"},
        ],
        "license": ["MIT", "Second\nlicence"],
    }


def test_windows_line_ends_and_no_line_end_at_last() -> None:
    parts = parse_modelfile("\ufeffFROM a\r\nSYSTEM b c")
    assert (parts.sources, parts.system) == (["a"], "b c")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "FROM"),
        ("SYSTEM x", "FROM"),
        ("FROM a\nNOPE b", "line 2: 'NOPE'"),
        ("FROM a\n\nPARAMETER top_k", "line 3"),
        ("FROM a\nPARAMETER topk 3", "line 2: unknown parameter 'topk'; did you mean top_k"),
        ("FROM a\nPARAMETER top_k few", "line 2: .* of type integer, not 'few'"),
        ('FROM a\nSYSTEM """x', "no end"),
        ("FROM a\nMESSAGE pirate x", "pirate"),
        ("FROM a\nADAPTER x.gguf", "adapters"),
        ("FROM", "FROM"),
        ("<html>", "<html>"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        parse_modelfile(text)


@given(st.text())
def test_no_text_is_a_crash(text: str) -> None:
    with contextlib.suppress(UserError):
        assert parse_modelfile(text).sources


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters='"\r\ufeff')),
    st.sampled_from(["SYSTEM", "TEMPLATE", "LICENSE"]),
)
def test_a_long_text_comes_through_as_it_is(text: str, command: str) -> None:
    parts = parse_modelfile(f'FROM a\n{command} """{text}"""\nPARAMETER seed 1\n')
    kept = {"SYSTEM": parts.system, "TEMPLATE": parts.template, "LICENSE": parts.licenses[:1]}
    assert kept[command] in (text, [text])
    assert parts.parameters == {"seed": 1}
