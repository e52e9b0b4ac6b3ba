"""A template tells how its model writes."""

from __future__ import annotations

import pytest

from shimpy.chat.formats import choose_format
from shimpy.chat.template import ChatTemplate
from tests.chat.templates import ALL, CHATML_TOKENS, GEMMA2, QWEN25

TEMPLATES = {
    name: ChatTemplate.compile(source, control_tokens=tokens)
    for name, (source, tokens) in ALL.items()
}


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("qwen25", "hermes"),
        ("qwen3", "hermes"),
        ("qwen3-coder", "hermes"),
        ("llama31", "llama3"),
        ("mistral-v7", "mistral"),
        ("magistral", "mistral"),
        ("gemma4", "gemma"),
        ("deepseek-r1", "deepseek"),
        ("deepseek-v31", "deepseek"),
        ("granite33", "granite"),
        ("gemma2", "hermes"),
    ],
)
def test_the_way_of_calling_is_found(name: str, tool: str) -> None:
    chosen = choose_format(TEMPLATES[name], with_tools=True)
    assert chosen.tool.name == tool
    assert chosen.bare_json == (name == "llama31")


@pytest.mark.parametrize(
    ("name", "opener"),
    [
        ("qwen3", "<think>"),
        ("deepseek-r1", "<think>"),
        ("deepseek-v31", "<think>"),
        ("magistral", "[THINK]"),
        ("gemma4", "<|channel>thought"),
        ("granite33", "<think>"),
        ("qwen25", None),
        ("llama31", None),
    ],
)
def test_the_marks_of_thoughts_are_found(name: str, opener: str | None) -> None:
    thinking = choose_format(TEMPLATES[name]).thinking
    assert (None if thinking is None else thinking.opener) == opener


def test_harmony_is_known() -> None:
    chosen = choose_format(TEMPLATES["gpt-oss"])
    assert chosen.kind == "harmony"
    assert chosen.show_special
    assert chosen.thinks
    fallback = ChatTemplate.compile(
        None, control_tokens=["<|start|>", "<|channel|>", "<|message|>"]
    )
    assert choose_format(fallback).kind == "harmony"


@pytest.mark.parametrize(
    ("name", "alone", "with_tools"),
    [
        ("qwen3", False, False),
        ("mistral-v7", False, True),
        ("magistral", True, True),
        ("deepseek-r1", False, True),
        ("llama31", False, True),
    ],
)
def test_control_tokens_are_shown_where_they_are_marks(
    name: str, alone: bool, with_tools: bool
) -> None:
    assert choose_format(TEMPLATES[name]).show_special == alone
    assert choose_format(TEMPLATES[name], with_tools=True).show_special == with_tools


def test_response_tags_are_dropped_where_the_template_asks_for_them() -> None:
    thinking = choose_format(TEMPLATES["granite33"]).thinking
    assert thinking is not None
    assert thinking.noise == ("<response>", "</response>")


def test_a_prompt_that_ends_in_a_thought_is_seen() -> None:
    chosen = choose_format(TEMPLATES["deepseek-r1"])
    assert chosen.opens_thinking("<｜Assistant｜><think>\n")
    assert not chosen.opens_thinking("<｜Assistant｜><think>\n</think>\n")
    assert not choose_format(TEMPLATES["qwen25"]).opens_thinking("<think>")


def test_the_template_for_tools_decides_where_there_are_tools() -> None:
    template = ChatTemplate.compile(GEMMA2, tool_source=QWEN25, control_tokens=CHATML_TOKENS)
    assert choose_format(template, with_tools=True).tool.opener in QWEN25
