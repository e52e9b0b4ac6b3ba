"""Fill-in-the-middle prompts are made of the model's own tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.chat.fim import ContextFile, FimOrder, FimRole, fim_prompt
from shimpy.chat.vocabulary import control_tokens, fim_order, fim_roles
from shimpy.errors import UnsupportedError
from shimpy.protocol.messages import Fim, Text

BASIC: frozenset[FimRole] = frozenset(["prefix", "suffix", "middle"])
ALL_ROLES: frozenset[FimRole] = BASIC | {"repo", "separator"}
FILES = [ContextFile(filename="a.py", text="A"), ContextFile(text="B")]


def test_a_prompt_is_prefix_then_suffix_then_middle() -> None:
    assert fim_prompt("def f(", "\n", roles=BASIC) == [
        Fim("prefix"),
        Text("def f("),
        Fim("suffix"),
        Text("\n"),
        Fim("middle"),
    ]


def test_a_model_that_reads_the_suffix_first_gets_it_first() -> None:
    assert fim_prompt("def f(", "\n", roles=BASIC, order="suffix-first", middle="x") == [
        Fim("suffix"),
        Text("\n"),
        Fim("prefix"),
        Text("def f(x"),
        Fim("middle"),
    ]


@pytest.mark.parametrize(
    ("value", "order"),
    [("suffix-first", "suffix-first"), ("", "prefix-first"), ("psm", "prefix-first")],
)
def test_the_files_key_tells_the_order(value: str, order: FimOrder) -> None:
    assert fim_order(value) == order


def test_empty_sides_are_left_out() -> None:
    assert fim_prompt("", "", roles=BASIC) == [Fim("prefix"), Fim("suffix"), Fim("middle")]


def test_what_was_typed_already_follows_the_prefix() -> None:
    assert Text("def f(x") in fim_prompt("def f(", ")", roles=BASIC, middle="x")


def test_text_is_never_looked_through_for_control_tokens() -> None:
    parts = fim_prompt("<|fim_middle|>", "<|fim_prefix|>", roles=ALL_ROLES, context=FILES)
    assert not any(part.parse_special for part in parts if isinstance(part, Text))


def test_other_files_come_first_under_the_repositorys_name() -> None:
    parts = fim_prompt("p", "s", roles=ALL_ROLES, context=FILES, filename="c.py", repository="r")
    assert parts[:9] == [
        Fim("repo"),
        Text("r\n"),
        Fim("separator"),
        Text("a.py\n"),
        Text("A"),
        Fim("separator"),
        Text("tmp\n"),
        Text("B"),
        Fim("separator"),
    ]
    assert parts[9:11] == [Text("c.py\n"), Fim("prefix")]


def test_without_tokens_for_files_they_are_set_off_in_words() -> None:
    parts = fim_prompt("p", "s", roles=BASIC, context=FILES[:1])
    assert parts[:3] == [Text("\n\n--- snippet ---\n\n"), Text("A"), Fim("prefix")]


@pytest.mark.parametrize("missing", sorted(BASIC))
def test_a_model_without_the_tokens_is_refused(missing: FimRole) -> None:
    with pytest.raises(UnsupportedError, match="fill-in-the-middle"):
        fim_prompt("a", "b", roles=ALL_ROLES - {missing})


@given(
    prefix=st.text("p", max_size=50),
    suffix=st.text("s", max_size=50),
    n_files=st.integers(0, 4),
    room=st.integers(0, 200),
)
def test_what_is_kept_is_nearest_to_the_cursor_and_fits(
    prefix: str, suffix: str, n_files: int, room: int
) -> None:
    prefix, suffix = "0" + prefix, suffix + "0"
    files = [ContextFile(text=f"file{i}") for i in range(n_files)]
    parts = fim_prompt(prefix, suffix, roles=BASIC, context=files, max_chars=room)
    texts = [part.text for part in parts if isinstance(part, Text)]
    assert sum(map(len, texts)) <= room
    kept = [text for text in texts if text.startswith("file")]
    assert kept == [file.text for file in files[n_files - len(kept) :]]
    at = parts.index(Fim("suffix"))
    before, after = parts[at - 1], parts[at + 1]
    if isinstance(before, Text):
        assert prefix.endswith(before.text)
    if isinstance(after, Text):
        assert suffix.startswith(after.text)
    if room >= len(prefix) + len(suffix):
        assert before == Text(prefix)
        assert after == Text(suffix)


@pytest.mark.parametrize(
    ("tokens", "roles"),
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], BASIC),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<reponame>"], BASIC | {"repo"}),
        (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], BASIC),
        (["▁<PRE>", "▁<SUF>", "▁<MID>"], BASIC),
        (["<|repo_name|>", "<|file_sep|>"], {"repo", "separator"}),
        (["hello"], set()),
    ],
)
def test_the_tokens_are_found_by_their_texts(tokens: list[str], roles: set[FimRole]) -> None:
    assert fim_roles(["x", *tokens], {}) == roles


def test_the_tokens_are_found_by_the_files_keys() -> None:
    keys = {"tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.suffix_token_id"}
    assert fim_roles([], keys) == {"prefix", "suffix"}


def test_control_tokens_are_those_that_llama_cpp_takes_for_such() -> None:
    """The types say so, or the text: llama.cpp knows the ends of turns by name."""
    tokens = ["<unk>", "<s>", "hello", "<think>", "<|im_end|>", "<0x0A>", "<|fim_prefix|>"]
    assert control_tokens(tokens, [2, 3, 1, 4, 4, 6, 1]) == [
        "<unk>",
        "<s>",
        "<|im_end|>",
        "<|fim_prefix|>",
    ]
    assert control_tokens(tokens, None) == ["<|im_end|>", "<|fim_prefix|>"]
