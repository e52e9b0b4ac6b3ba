"""Prompts: parts to tokens, and long ones into the context."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.prompt import Prompts, fit_prompt
from shimpy.errors import ContextExceededError, UnsupportedError, UserError
from shimpy.protocol.messages import Fim, PromptPart, Text, Tokens
from tests.fake_backend import (
    BOS,
    CONTROL,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    N_VOCAB,
    FakeBackend,
)

AB = 270


class Merging(FakeBackend):
    """Has one more token: "ab", for the seams between parts."""

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        head, _, tail = text.partition("ab")
        ids = super().tokenize(head, parse_special=parse_special)
        return (
            ids if head == text else [*ids, AB, *self.tokenize(tail, parse_special=parse_special)]
        )


def tokenize(
    *parts: PromptPart, add_bos: bool = False, backend: FakeBackend | None = None
) -> list[int]:
    return Prompts(backend or FakeBackend()).tokenize(parts, add_bos=add_bos)


def test_parts_follow_each_other() -> None:
    parts = [Fim("prefix"), Text("a"), Fim("suffix"), Tokens([7, 8]), Fim("middle")]
    assert tokenize(*parts) == [FIM_PREFIX, ord("a"), FIM_SUFFIX, 7, 8, FIM_MIDDLE]


def test_control_tokens_are_parsed_only_where_that_is_allowed() -> None:
    assert tokenize(Text("<ctl>", parse_special=True)) == [CONTROL]
    assert tokenize(Text("<ctl>")) == list(b"<ctl>")


@pytest.mark.parametrize("parse_special", [True, False])
def test_one_part_is_tokenized_once(parse_special: bool) -> None:
    backend = FakeBackend()
    with mock.patch.object(backend, "tokenize", wraps=backend.tokenize) as spy:
        ids = tokenize(Text("hi <ctl>", parse_special=parse_special), backend=backend)
    assert ids == backend.tokenize("hi <ctl>", parse_special=parse_special)
    assert spy.call_count == 1


def test_a_users_control_token_stays_text_between_parts_of_a_template() -> None:
    template, user = Text("<ctl>", parse_special=True), Text("hi <ctl>")
    assert tokenize(template, user, template) == [CONTROL, *b"hi <ctl>", CONTROL]


def test_a_control_token_cant_be_put_together_from_two_parts() -> None:
    template = Text("<ctl>", parse_special=True)
    assert tokenize(template, Text("<ct"), Text("l>")) == [CONTROL, *b"<ctl>"]
    assert tokenize(Text("<ct"), Text("l>x", parse_special=True)) == list(b"<ctl>x")


def test_tokens_reach_over_the_seam_of_two_parts() -> None:
    """The model was trained on whole texts, not on the pieces that a template is made of."""
    template = Text("<ctl>a", parse_special=True)
    assert tokenize(template, Text("b."), backend=Merging()) == [CONTROL, AB, ord(".")]


@given(
    st.lists(
        st.tuples(st.sampled_from(["<ctl>", "<", "ct", "l>", "hi", "a", "b"]), st.booleans()),
        max_size=6,
    )
)
def test_the_text_is_always_all_there_and_the_users_part_is_no_control(
    parts: list[tuple[str, bool]],
) -> None:
    backend = Merging()
    ids = tokenize(Tokens([1]), *(Text(*part) for part in parts), backend=backend)[1:]
    pieces = {AB: b"ab"}
    data = b"".join(pieces.get(token) or backend.piece(token, special=True) for token in ids)
    assert data.decode() == "".join(text for text, _ in parts)
    n_allowed = sum(text == "<ctl>" and is_special for text, is_special in parts)
    assert ids.count(CONTROL) == n_allowed


def test_the_start_token_comes_first_once() -> None:
    assert tokenize(Text("a"), add_bos=True) == [BOS, ord("a")]
    assert tokenize(Text("<s>a", parse_special=True), add_bos=True) == [BOS, ord("a")]
    assert tokenize(Text("a")) == [ord("a")]


def test_a_model_that_wants_no_start_token_gets_none() -> None:
    backend = FakeBackend()
    backend.add_bos = False
    assert tokenize(Text("a"), add_bos=True, backend=backend) == [ord("a")]


def test_an_empty_prompt_is_the_start_token() -> None:
    assert tokenize() == tokenize(Text("")) == [BOS]


def test_an_empty_prompt_without_a_start_token_is_refused() -> None:
    backend = FakeBackend()
    backend.bos_id = -1
    with pytest.raises(UserError, match="the prompt is empty"):
        tokenize(backend=backend)


@pytest.mark.parametrize("token", [-1, N_VOCAB])
def test_a_token_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(UserError, match=rf"token id {token} .* 0 to {N_VOCAB - 1}"):
        tokenize(Tokens([1, token]))


def test_a_model_without_the_fill_in_token_says_so() -> None:
    with pytest.raises(UnsupportedError, match="no fill-in-the-middle token for the repo"):
        tokenize(Fim("repo"))


def fit(n_prompt: int, *, n_ctx: int = 100, n_keep: int = 10, truncate: bool = True) -> list[int]:
    return fit_prompt(list(range(n_prompt)), n_ctx=n_ctx, n_keep=n_keep, truncate=truncate)


def test_a_prompt_that_leaves_room_for_a_token_fits() -> None:
    assert fit(99, truncate=False) == list(range(99))


def test_a_longer_one_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ContextExceededError, match="100 tokens, and the context holds 100"
    ) as caught:
        fit(100, truncate=False)
    assert (caught.value.n_prompt, caught.value.n_ctx) == (100, 100)


@given(st.integers(0, 500), st.integers(4, 120), st.integers(-1, 200))
def test_a_cut_prompt_keeps_its_start_and_its_end(n_prompt: int, n_ctx: int, n_keep: int) -> None:
    cut = fit(n_prompt, n_ctx=n_ctx, n_keep=n_keep)
    assert len(cut) < n_ctx
    if len(cut) == n_prompt:
        return
    kept = min(n_keep if n_keep >= 0 else n_ctx, n_ctx // 2)
    assert cut[:kept] == list(range(kept))
    assert cut[-1] == n_prompt - 1
    assert len(cut) >= kept + (n_ctx - kept) // 2


def test_the_cut_stays_where_it_is_while_a_conversation_grows() -> None:
    """So that each turn finds the KV cache of the last."""
    cuts = {fit(n)[10] for n in range(101, 146)}
    assert len(cuts) <= 2
