"""Constrained text: random weights, which reject every rule, have to follow it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from shimpy.engine.llama import LlamaBackend
from shimpy.engine.llama.grammar import Grammar, GrammarMaker, PieceTable
from shimpy.errors import InvalidOptionError
from shimpy.protocol.messages import Sampling
from tests.engine.llama.running import generate, generate_ids, loaded, prefill, prompt_ids, text_of
from tests.synthetic import write_chain, write_llama

JSON = r"""
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws ( string ":" ws value ( "," ws string ":" ws value )* )? "}"
array  ::= "[" ws ( value ( "," ws value )* )? "]"
string ::= "\"" ( [^"\\\x00-\x1f] | "\\" ["\\/bfnrt] ){0,20} "\""
number ::= "-"? ( "0" | [1-9] [0-9]{0,5} ) ( "." [0-9]{1,3} )?
ws     ::= " "?
"""
ITEM = r"""
root ::= "{\"name\": \"" [a-z]{3,12} "\", \"size\": " [1-9] [0-9]{0,3} "}"
"""
KINDS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 5},
    "wide": {"temperature": 3.0, "seed": 5, "top_k": 0, "top_p": 1.0},
    "typical": {"temperature": 1.0, "seed": 5, "typical_p": 0.5, "min_p": 0.05},
    "mirostat 1": {"temperature": 1.0, "seed": 5, "mirostat": 1},
    "mirostat 2": {"temperature": 1.0, "seed": 5, "mirostat": 2},
    "penalties": {"temperature": 1.0, "seed": 5, "repeat_penalty": 1.3, "presence_penalty": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["Hello", "x", "日本"])
def test_random_weights_follow_a_schema(llama: LlamaBackend, kind: str, prompt: str) -> None:
    sampling = Sampling(grammar=ITEM, **KINDS[kind])  # type: ignore[arg-type]
    ids = generate_ids(llama, prompt, sampling, n=100)
    assert llama.is_eog(ids[-1])
    item = json.loads(text_of(llama, ids))
    assert re.fullmatch("[a-z]{3,12}", item["name"])
    assert 1 <= item["size"] < 10_000


@pytest.mark.parametrize("seed", range(12))
def test_random_weights_write_json(llama: LlamaBackend, seed: int) -> None:
    sampling = Sampling(grammar=JSON, seed=seed, temperature=1.5, top_k=0, top_p=1.0)
    ids = generate_ids(llama, "Hello", sampling, n=400)
    text = text_of(llama, ids)
    if llama.is_eog(ids[-1]):
        assert isinstance(json.loads(text), dict)
    else:
        assert text.startswith("{")


def test_a_seed_repeats_under_a_grammar(llama: LlamaBackend) -> None:
    sampling = Sampling(grammar=JSON, seed=3)
    first = generate_ids(llama, "Hello", sampling)
    assert generate_ids(llama, "Hello", sampling) == first


def test_a_grammar_that_agrees_changes_nothing(chain: LlamaBackend) -> None:
    free = generate(chain, "Hello", n=100)
    assert (
        generate(chain, "Hello", Sampling(temperature=0, grammar="root ::= [^\\x00]*"), n=100)
        == free
    )


def test_characters_in_pieces_are_followed(chain: LlamaBackend) -> None:
    """The chain's tokens end inside characters; the grammar waits for the rest."""
    grammar = "root ::= [ -~]+ [日] [本] [ -~ï]+ [🙂] .*"
    text = generate(chain, "Hello", Sampling(temperature=0, grammar=grammar), n=100)
    assert text.startswith("Once upon a time in 日本, a naïve 🙂 fox")


def test_greedy_takes_the_likeliest_that_is_allowed(llama: LlamaBackend) -> None:
    """Against a mask over the whole vocabulary."""
    ids = prompt_ids(llama, "Hello")
    prefill(llama, ids)
    logits = llama._context.row(0)
    allowed = [
        t
        for t in range(llama.n_vocab)
        if re.fullmatch(rb"[xyz]{1,3}", llama.piece(t, special=False))
    ]
    sampler = llama.make_sampler(Sampling(temperature=0, grammar="root ::= [xyz]{1,3}"), ids)
    token, _ = sampler.sample(0)
    sampler.close()
    assert token == max(allowed, key=lambda t: logits[t])


@pytest.mark.parametrize("done", ["", "{", '{"', '{"a', '{"a"', '{"a":', '{"a":1', "{}"])
def test_the_tables_shortcut_finds_what_a_whole_mask_finds(llama: LlamaBackend, done: str) -> None:
    """By first byte and by best logits, or all of the vocabulary: the same tokens."""
    vocab = llama._vocab
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(llama.n_vocab).astype(np.float32)
    quick = _after(llama, GrammarMaker(vocab), JSON, done)
    whole = np.array([t for t in range(llama.n_vocab) if quick.accepts(t)])
    np.testing.assert_array_equal(np.sort(quick.allowed(logits, llama.n_vocab)), whole)
    best = quick.allowed(logits, 1)
    assert logits[best].max() == logits[whole].max()
    quick.close()


def _after(backend: LlamaBackend, maker: GrammarMaker, text: str, done: str) -> Grammar:
    grammar = maker.make(text)
    for byte in done.encode():
        assert grammar.accepts(byte)
        grammar.accept(byte)
    return grammar


def test_a_finished_text_ends(llama: LlamaBackend) -> None:
    ids = generate_ids(llama, "Hello", Sampling(temperature=0, grammar='root ::= "yes"'))
    assert text_of(llama, ids) == "yes"
    assert llama.is_eog(ids[-1])


def test_a_text_may_not_end_early(llama: LlamaBackend) -> None:
    """A favoured end token is refused until the grammar is done."""
    sampling = Sampling(
        temperature=0, grammar='root ::= "yes" "!"{5}', logit_bias={llama.eos_id: 100.0}
    )
    assert generate(llama, "Hello", sampling) == "yes!!!!!"


def test_a_control_token_is_no_text(llama: LlamaBackend) -> None:
    """<|im_start|> would pass for eleven characters, and the text would lack them."""
    (token,) = llama.tokenize("<|im_start|>", parse_special=True)
    sampling = Sampling(temperature=0, grammar="root ::= [^\\n]{30}", logit_bias={token: 100.0})
    ids = generate_ids(llama, "Hello", sampling)
    assert token not in ids
    assert len(text_of(llama, ids)) == 30


def test_where_all_is_banned_the_text_ends(llama: LlamaBackend) -> None:
    banned = {t: -np.inf for t in range(llama.n_vocab) if b"a" in llama.piece(t, special=False)}
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, grammar='root ::= "ba"', logit_bias=banned)
        ids = generate_ids(llama, "Hello", sampling)
        assert text_of(llama, ids) == "b"
        assert llama.is_eog(ids[-1])


def test_rules_may_name_tokens(llama: LlamaBackend) -> None:
    grammar = 'root ::= "go" <think> [a-z]{3} </think>'
    ids = generate_ids(llama, "Hello", Sampling(temperature=0, grammar=grammar))
    text = text_of(llama, ids)
    assert re.fullmatch("go<think>[a-z]{3}</think>", text)
    assert llama.tokenize("<think>", parse_special=True)[0] in ids


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("root ::= (", "expecting ')'"),
        ("", "empty"),
        ('start ::= "a"', "root"),
        ("root ::= other", "Undefined rule identifier 'other'"),
        ('root ::= root "a"', "left recursion"),
        ('root ::= "a"{3000}', "repetitions exceeds"),
        ('root ::= "a\0"', "zero byte"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "5000 deep"),
        ('root ::= "a"\n' + "".join(f'r{i} ::= "a"\n' for i in range(20_000)), "20001 rules"),
        ('root ::= "' + "a" * 2**21 + '"', "limit"),
    ],
    ids=["open", "empty", "no root", "undefined", "left", "huge", "zero", "deep", "rules", "long"],
)
def test_a_grammar_that_is_none_is_explained(llama: LlamaBackend, text: str, said: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"(?s){re.escape(said)}") as caught:
        llama.make_sampler(Sampling(grammar=text), [])
    assert caught.value.option == "grammar"


def test_brackets_in_literals_are_no_groups(llama: LlamaBackend) -> None:
    grammar = 'root ::= "' + "(" * 500 + '" # ((((\n'
    assert generate(llama, "x", Sampling(temperature=0, grammar=grammar), n=600) == "(" * 500


def test_a_large_vocabulary_is_followed_too(tmp_path: Path) -> None:
    """More tokens than are tested at first."""
    with loaded(write_llama(tmp_path / "large.gguf", n_vocab=8000)) as backend:
        for options in KINDS.values():
            sampling = Sampling(grammar=ITEM, **options)  # type: ignore[arg-type]
            json.loads(generate(backend, "Hello", sampling, n=100))


def test_pieces_of_any_length_are_known(tmp_path: Path) -> None:
    """A mask that lost the long ones would change what the chain says."""
    text = "An internationalisation-of-everything-and-more goes on"
    with loaded(write_chain(tmp_path / "long.gguf", text)) as backend:
        # Bans the token of the prompt's answer at first: the grammar looks for it itself.
        first = generate_ids(backend, "Hello", n=1)[0]
        sampling = Sampling(temperature=0, grammar='root ::= "An" .*', logit_bias={first: -1e6})
        assert generate(backend, "Hello", sampling, n=20).startswith("An")
        table = PieceTable(backend._vocab)
        for token in range(backend.n_vocab):
            piece = backend.piece(token, special=True)
            is_text = not (backend._vocab.is_control(token) or backend.is_eog(token))
            grouped = [byte for byte in range(256) if token in table.starting_with[byte]]
            assert grouped == ([piece[0]] if is_text else [])
        assert max(len(backend.piece(t, special=True)) for t in range(backend.n_vocab)) > 40
