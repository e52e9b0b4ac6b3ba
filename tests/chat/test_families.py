"""The fallback templates are those that llama.cpp has built in, where it has them."""

from __future__ import annotations

import ctypes
from datetime import UTC, datetime

import llama_cpp.llama_cpp as lib
import pytest

from shimpy.chat import families
from shimpy.chat.families import Family
from shimpy.chat.messages import ChatMessage
from shimpy.chat.template import ChatTemplate

MESSAGES = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="Hi"),
    ChatMessage(role="assistant", content="Hello"),
    ChatMessage(role="user", content="Bye"),
]


def render_builtin(name: str) -> str:
    """What llama_chat_apply_template makes of the conversation."""
    array = (lib.llama_chat_message * len(MESSAGES))(
        *(
            lib.llama_chat_message(role=m.role.encode(), content=m.content.encode())
            for m in MESSAGES
        )
    )
    buffer = ctypes.create_string_buffer(4096)
    n = lib.llama_chat_apply_template(name.encode(), array, len(MESSAGES), True, buffer, 4096)
    assert n > 0
    return buffer.raw[:n].decode()


@pytest.mark.parametrize(
    ("family", "builtin", "eos"),
    [
        (families.CHATML, "chatml", "</s>"),
        (families.LLAMA3, "llama3", "</s>"),
        (families.MISTRAL, "mistral-v3", "</s>"),
        (families.GEMMA, "gemma", "</s>"),
        (families.PHI3, "phi3", "</s>"),
        (families.ZEPHYR, "zephyr", "<|endoftext|>"),
        (families.GRANITE, "granite", "</s>"),
        (families.VICUNA, "vicuna", "</s>"),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else None,
)
def test_a_fallback_is_what_llama_cpp_makes(family: Family, builtin: str, eos: str) -> None:
    template = ChatTemplate.compile(family.template, eos_text=eos)
    rendered = template.render(MESSAGES, now=datetime(2025, 1, 1, tzinfo=UTC))
    assert rendered.text == render_builtin(builtin)


@pytest.mark.parametrize(
    "family", [value for value in vars(families).values() if isinstance(value, Family)]
)
def test_every_fallback_takes_a_whole_conversation(family: Family) -> None:
    template = ChatTemplate.compile(family.template, bos_text="<s>", eos_text="</s>", strict=True)
    text = template.render(MESSAGES, now=datetime(2025, 1, 1, tzinfo=UTC)).text
    places = [text.index(message.content) for message in MESSAGES]
    assert places == sorted(places)
