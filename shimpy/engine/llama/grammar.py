"""Text constrained by a GBNF grammar, without masking the whole vocabulary for each token.

The token that was chosen anyway is tested alone first (as llama.cpp's common/sampling.cpp
does). Only when the grammar rejects it are the allowed tokens looked for: by first byte, so
that a position where only a quote may follow tests the tokens that start with one, and in the
order of their logits, so that no more are tested than can be chosen.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.candidates import Candidates
from shimpy.engine.llama.library import LL, Pointer
from shimpy.engine.llama.vocab import ATTR_NORMAL, Vocab
from shimpy.errors import InvalidOptionError
from shimpy.units import MIB

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

# llama.cpp's parser and its check of rules are recursive, on the stack.
_MAX_BYTES = MIB
_MAX_DEPTH = 200
_MAX_RULES = 10_000
# Quoted strings and character classes, in which brackets and < mean themselves.
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)
_FIRST_TESTED = 512
_STDERR = 2
_BYTES = 256


class PieceTable:
    """The vocabulary by the first byte of its pieces; control tokens are in no text."""

    def __init__(self, vocab: Vocab) -> None:
        """Read every piece: about 1 us a token."""
        first, sizes = vocab.first_bytes()
        odd = np.flatnonzero(vocab.all_attributes() != ATTR_NORMAL)
        ends = [token for token in odd.tolist() if vocab.is_eog(token)]
        control = [token for token in odd.tolist() if vocab.is_control(token)]
        # In no group: end tokens are asked for by themselves, the others never.
        sizes[ends + control] = 0
        group = np.where(sizes > 0, first.astype(np.int16), -1)
        order = np.argsort(group, kind="stable").astype(np.int32)
        bounds = np.searchsorted(group[order], np.arange(_BYTES + 1))
        self.ends: Ids = np.array(ends, np.int32)
        self.starting_with = [
            order[start:stop] for start, stop in itertools.pairwise(bounds.tolist())
        ]
        # The token of each byte alone; -1: there is none.
        self.single = np.full(_BYTES, -1, np.int32)
        alone = np.flatnonzero(sizes == 1)
        self.single[first[alone]] = alone


class GrammarMaker:
    """Makes the grammars of one vocabulary."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab

    @cached_property
    def _table(self) -> PieceTable:
        return PieceTable(self._vocab)

    def make(self, text: str) -> Grammar:
        """Return the grammar of a GBNF text with the start rule `root`.

        Raises:
            InvalidOptionError: the text is no grammar; carries the parser's words.
        """
        _check(text)
        return Grammar(self._vocab, self._table, text, _parse(self._vocab, text))


class Grammar:
    """Where one text is in its grammar."""

    def __init__(self, vocab: Vocab, table: PieceTable, text: str, handle: Pointer) -> None:
        self._vocab = vocab
        self._table = table
        self._handle = handle
        self._candidates = Candidates()
        # Rules may name tokens, <think> or <[7]>, and then a first byte decides nothing.
        self._has_token_rules = "<" in _LITERAL.sub("", text)

    def accepts(self, token: int) -> bool:
        """Whether the text may go on with the token; an end token: whether it may end."""
        if self._vocab.is_control(token) and not self._may_name(token):
            return False
        return len(self._surviving(np.array([token], np.int32))) == 1

    def accept(self, token: int) -> None:
        """Go on with a token that `accepts` said yes to; with others llama.cpp aborts."""
        LL.llama_sampler_accept(self._handle, token)

    def allowed(self, logits: Row, n_best: int) -> Ids:
        """Return the `n_best` allowed tokens of highest logit or more, in no order.

        Fewer are returned when no more are allowed; tokens banned by their logit are not.
        """
        ids = self._possible()
        ids = ids[logits[ids] > -np.inf]
        n_tested = min(max(_FIRST_TESTED, n_best), len(ids))
        if n_tested < len(ids):
            best = ids[np.argpartition(-logits[ids], n_tested)[:n_tested]]
            found = self._surviving(best)
            if len(found) >= n_best:
                return found
        return self._surviving(ids)

    def close(self) -> None:
        """Free it."""
        if self._handle:
            LL.llama_sampler_free(self._handle)
            self._handle = 0

    def _possible(self) -> Ids:
        """Return the tokens whose first byte may come next, and the end tokens."""
        table = self._table
        if self._has_token_rules:
            return np.arange(self._vocab.n_tokens, dtype=np.int32)
        tested = table.single[table.single >= 0]
        allowed = set(self._surviving(tested).tolist())
        groups = [
            group
            for group, single in zip(table.starting_with, table.single.tolist(), strict=True)
            if single < 0 or single in allowed
        ]
        return np.concatenate([table.ends, *groups])

    def _surviving(self, ids: Ids) -> Ids:
        if not len(ids):
            return ids
        candidates = self._candidates
        candidates.fill(ids, 0.0)
        candidates.apply(self._handle)
        surviving: Ids = ids[candidates.logits == 0]
        return surviving

    def _may_name(self, token: int) -> bool:
        return self._has_token_rules or self._vocab.is_eog(token)


def _check(text: str) -> None:
    if not text.strip():
        raise InvalidOptionError("the grammar is empty", option="grammar")
    if "\0" in text:
        raise InvalidOptionError("the grammar holds a zero byte", option="grammar")
    if len(text) > _MAX_BYTES:
        raise InvalidOptionError(
            f"the grammar has {len(text)} characters; the limit is {_MAX_BYTES}", option="grammar"
        )
    bare = _LITERAL.sub("", text)
    n_rules = bare.count("::=")
    if n_rules > _MAX_RULES:
        raise InvalidOptionError(
            f"the grammar has {n_rules} rules; the limit is {_MAX_RULES}", option="grammar"
        )
    depth = deepest = 0
    for bracket in re.findall(r"[()]", bare):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        raise InvalidOptionError(
            f"the grammar's groups are {deepest} deep; the limit is {_MAX_DEPTH}", option="grammar"
        )


def _parse(vocab: Vocab, text: str) -> Pointer:
    data = text.encode(errors="replace")
    handle: Pointer | None = LL.llama_sampler_init_grammar(vocab.handle, data, b"root")
    if handle:
        return handle
    # Once more, to hear why.
    with _captured_stderr() as said:
        LL.llama_sampler_init_grammar(vocab.handle, data, b"root")
    reason = " ".join(said.decode(errors="replace").split())
    raise InvalidOptionError(f"the grammar can't be used: {reason}", option="grammar")


@contextlib.contextmanager
def _captured_stderr() -> Iterator[bytearray]:
    """Collect what C code prints to stderr meanwhile: the parser says its errors nowhere else."""
    # 20 ms that only a bad grammar needs.
    import tempfile

    said = bytearray()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(_STDERR)
        os.dup2(file.fileno(), _STDERR)
        try:
            yield said
        finally:
            os.dup2(saved, _STDERR)
            os.close(saved)
            file.seek(0)
            said += file.read()
