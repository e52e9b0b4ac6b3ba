"""One request's sampler: penalties, the draw, the grammar, and what is reported of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.choosers import Chooser, make_chooser
from shimpy.engine.llama.context import Context
from shimpy.engine.llama.grammar import Grammar, GrammarMaker
from shimpy.engine.llama.logprobs import token_logprob
from shimpy.engine.llama.penalties import Bias, Penalties
from shimpy.engine.llama.vocab import Vocab
from shimpy.errors import InvalidOptionError, WorkerError
from shimpy.protocol.messages import Sampling, TokenLogprob

Row = npt.NDArray[np.float32]

_MIROSTAT_KINDS = (0, 1, 2)


class LlamaSampler:
    """Chooses the tokens of one request and remembers what it chose; see Backend."""

    def __init__(
        self,
        context: Context,
        vocab: Vocab,
        grammars: GrammarMaker,
        sampling: Sampling,
        history: Sequence[int],
    ) -> None:
        """Check the options and build it.

        Raises:
            InvalidOptionError: an option or the grammar can't be used.
        """
        _check(sampling)
        self._context = context
        self._vocab = vocab
        self._n_logprobs = sampling.n_logprobs
        n_vocab = vocab.n_tokens
        self._penalties = Penalties(sampling, history, n_ctx=context.n_ctx, n_vocab=n_vocab)
        biases = sampling.logit_bias
        if sampling.ignore_eos:
            biases = biases | dict.fromkeys(vocab.eog_ids, -np.inf)
        self._bias = Bias(biases, n_vocab=n_vocab)
        self._has_edits = self._penalties.is_active or self._bias.is_active
        self._grammar: Grammar | None = None
        if sampling.grammar is not None:
            self._grammar = grammars.make(sampling.grammar)
        self._chooser: Chooser = make_chooser(sampling, vocab)
        # Nothing but the logits decides.
        self._is_plain = not self._has_edits and self._grammar is None

    def sample(self, row: int) -> tuple[int, TokenLogprob | None]:
        """Return the token chosen from the logits of output `row` of the last decode.

        The logits are left as they were.

        Raises:
            WorkerError: there is no such output, or the model computes NaN.
        """
        logits = self._context.row(row)
        if self._is_plain:
            token = self._chooser.choose(logits)
        elif self._has_edits:
            token = self._choose_edited(logits)
        else:
            token = self._choose(logits)
        if self._n_logprobs is None:
            return token, None
        return token, token_logprob(self._vocab, logits, token, self._n_logprobs)

    def close(self) -> None:
        """Free what llama.cpp holds for it; may be called again."""
        self._chooser.close()
        if self._grammar is not None:
            self._grammar.close()

    def _choose_edited(self, logits: Row) -> int:
        # First in, last out: a token may have both.
        undo = [self._penalties.apply(logits)]
        if self._bias.is_active:
            undo.append(self._bias.apply(logits))
        try:
            token = self._choose(logits)
        finally:
            for edit in reversed(undo):
                if edit is not None:
                    ids, old = edit
                    logits[ids] = old
        self._penalties.accept(token)
        return token

    def _choose(self, logits: Row) -> int:
        token = self._chooser.choose(logits)
        grammar = self._grammar
        if grammar is None:
            return token
        if not grammar.accepts(token) or logits[token] == -np.inf:
            ids = grammar.allowed(logits, self._chooser.n_best)
            token = self._chooser.choose_among(ids, logits[ids]) if len(ids) else self._end()
        if not self._vocab.is_eog(token):
            grammar.accept(token)
        return token

    def _end(self) -> int:
        """Return a token that ends the text: the grammar allows nothing that can be said."""
        if self._vocab.eos_id < 0:
            raise WorkerError("the grammar allows no token of the model, which has no end token")
        return self._vocab.eos_id


def _check(sampling: Sampling) -> None:
    """Refuse what llama.cpp would abort on or answer with nonsense."""
    for option in (
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repeat_penalty",
        "presence_penalty",
        "frequency_penalty",
        "mirostat_tau",
        "mirostat_eta",
        "top_n_sigma",
        "xtc_probability",
        "xtc_threshold",
        "dynatemp_range",
        "dynatemp_exponent",
    ):
        value = getattr(sampling, option)
        if not math.isfinite(value):
            raise InvalidOptionError(f"{option} is {value}, which is no number", option=option)
    if sampling.repeat_penalty <= 0:
        raise InvalidOptionError(
            f"repeat_penalty is {sampling.repeat_penalty}; it has to be over 0, 1 for none",
            option="repeat_penalty",
        )
    if sampling.mirostat not in _MIROSTAT_KINDS:
        raise InvalidOptionError(
            f"mirostat is {sampling.mirostat}; it is 0 (off), 1 or 2", option="mirostat"
        )
    if sampling.n_logprobs is not None and sampling.n_logprobs < 0:
        raise InvalidOptionError(
            f"n_logprobs is {sampling.n_logprobs}; it is 0 or more", option="n_logprobs"
        )
