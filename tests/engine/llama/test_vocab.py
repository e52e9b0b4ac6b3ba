"""Text to tokens and back, from any thread, whatever the text."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.engine.llama import LlamaBackend
from shimpy.engine.llama.vocab import _MAX_RUN, split_long_runs
from shimpy.errors import WorkerError
from tests.engine.llama.running import generate_ids, load, run_apart, text_of
from tests.synthetic import write_llama

runs = st.lists(
    st.tuples(
        st.sampled_from(["a", " ", "é", "1", "\n", "日", "ab, ", "x.y "]),
        st.integers(1, 3 * _MAX_RUN),
    ),
    max_size=5,
).map(lambda parts: "".join(unit * (n // len(unit) + 1) for unit, n in parts))


def test_text_survives_the_round_trip(llama: LlamaBackend) -> None:
    text = "Hello wörld 日本 🙂\n x"
    assert text_of(llama, llama.tokenize(text, parse_special=False)) == text


def test_control_tokens_are_read_only_where_asked(llama: LlamaBackend) -> None:
    """A user's text must not become a turn of the chat."""
    assert len(llama.tokenize("<|im_end|>", parse_special=True)) == 1
    ids = llama.tokenize("<|im_end|>", parse_special=False)
    assert not any(llama.is_eog(token) for token in ids)
    assert text_of(llama, ids) == "<|im_end|>"


def test_a_control_token_is_shown_only_as_special(llama: LlamaBackend) -> None:
    (token,) = llama.tokenize("<|im_end|>", parse_special=True)
    assert llama.piece(token, special=False) == b""
    assert llama.piece(token, special=True) == b"<|im_end|>"


def test_ends_of_text_are_known(llama: LlamaBackend) -> None:
    ends = [
        t
        for t in ("</s>", "<|im_end|>", "<|endoftext|>")
        if llama.is_eog(*llama.tokenize(t, parse_special=True))
    ]
    assert ends == ["</s>", "<|im_end|>", "<|endoftext|>"]
    assert llama.piece(llama.bos_id, special=True) == b"<s>"
    assert llama.piece(llama.eos_id, special=True) == b"</s>"
    assert llama.end_ids == []
    assert llama.between_ids == []


def test_fim_tokens_are_found_by_their_text(llama: LlamaBackend) -> None:
    assert llama.has_fim
    shown = {
        role: llama.piece(llama.fim_token(role), special=True)
        for role in ("prefix", "suffix", "middle", "repo", "separator")
    }
    assert shown == {
        "prefix": b"<|fim_prefix|>",
        "suffix": b"<|fim_suffix|>",
        "middle": b"<|fim_middle|>",
        "repo": b"<|repo_name|>",
        "separator": b"<|file_sep|>",
    }


@pytest.mark.parametrize("token", [-1, 512, 2**31 - 1])
def test_a_token_that_is_none_is_an_error(llama: LlamaBackend, token: int) -> None:
    """llama.cpp throws through C, which would end the worker."""
    with pytest.raises(WorkerError, match=str(token)):
        llama.piece(token, special=False)


def test_a_lone_surrogate_is_no_crash(llama: LlamaBackend) -> None:
    """JSON can say half a character; UTF-8 can't."""
    assert text_of(llama, llama.tokenize("a\ud83db", parse_special=False)) == "a?b"


def test_an_empty_text_has_no_tokens(llama: LlamaBackend) -> None:
    assert llama.tokenize("", parse_special=True) == []


def test_text_is_tokenized_while_the_model_decodes(llama: LlamaBackend) -> None:
    text = "the quick brown fox " * 200
    expected = llama.tokenize(text, parse_special=False)
    alone = generate_ids(llama, "Hello", n=100)
    seen: list[list[int]] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            seen.append(llama.tokenize(text, parse_special=False))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert generate_ids(llama, "Hello", n=100) == alone
    finally:
        done.set()
        thread.join()
    assert all(ids == expected for ids in seen)


@given(runs)
def test_long_runs_are_cut_and_nothing_is_lost(text: str) -> None:
    parts = split_long_runs(text)
    assert "".join(parts) == text
    for part in parts[:-1]:
        assert part
    longest = max((len(run) for part in parts for run in part.split()), default=0)
    assert longest <= _MAX_RUN


def test_a_long_run_is_cut_behind_a_word() -> None:
    text = "word," * 4000
    parts = split_long_runs(text)
    assert len(parts) == 3
    assert all(part.endswith("word") for part in parts[:-1])


def test_text_of_words_is_not_cut() -> None:
    text = "word " * 10_000
    assert split_long_runs(text) == [text]


def test_a_hundred_thousand_letters_do_not_end_the_worker(tmp_path: Path) -> None:
    """llama.cpp's pre-tokenizers recurse once a letter: 27,000 overflow the stack."""
    path = write_llama(tmp_path / "regex.gguf", tokenizer_pre="deepseek-llm")
    said = run_apart(
        """
        from pathlib import Path
        backend = load(Path(sys.argv[1]))
        for unit in ("a", " ", "1", "!", "日", "a!"):
            text = unit * 100_000
            print(text_of(backend, backend.tokenize(text, parse_special=False)) == text)
        """,
        path,
    )
    assert said.split() == ["True"] * 6


def test_bert_wants_its_separator_behind_a_text(bert_model: Path) -> None:
    backend = load(bert_model, embedding=True)
    assert backend.add_bos
    assert backend.piece(backend.bos_id, special=True) == b"[CLS]"
    assert [backend.piece(token, special=True) for token in backend.end_ids] == [b"[SEP]"]
    assert backend.between_ids == backend.end_ids
    backend.close()
