"""One Submit from its admission to its Done: its text, its counts, its clock."""

from __future__ import annotations

from typing import Final

from shimpy.engine.backend import Backend, Sampler, n_ctx_seq
from shimpy.engine.intake import Prompted
from shimpy.engine.sequence import Sequence
from shimpy.engine.text import Attached, TextStream
from shimpy.protocol.messages import Delta, Done, FinishReason, Prefilled, TokenLogprob

# Generation without a limit ends after this many contexts, as Ollama's does.
MAX_CONTEXTS: Final = 10


class Pieces(dict[int, bytes | None]):
    """The bytes of each token met so far; None: it ends a generation."""

    def __init__(self, backend: Backend, *, special: bool) -> None:
        super().__init__()
        self._backend = backend
        self._special = special

    def __missing__(self, token: int) -> bytes | None:
        is_end = self._backend.is_eog(token)
        piece = None if is_end else self._backend.piece(token, special=self._special)
        self[token] = piece
        return piece


class Generation:
    """What the loop knows of a request beside its sequence."""

    __slots__ = (
        "_backend",
        "_bytes",
        "_is_ended_by_token",
        "_is_watched",
        "_logprobs",
        "_n_unsent",
        "_prefilled_s",
        "_unsent",
        "_work",
        "is_over",
        "pieces",
        "request",
        "sampler",
        "sequence",
        "text",
    )

    def __init__(self, work: Prompted, backend: Backend, sampler: Sampler, pieces: Pieces) -> None:
        submit = work.submit
        n_max = MAX_CONTEXTS * n_ctx_seq(backend)
        self.request = submit.request
        self.sequence = Sequence(
            request=submit.request,
            tokens=work.ids,
            n_predict=n_max if submit.n_predict < 0 else min(submit.n_predict, n_max),
            n_keep=submit.n_keep if submit.shift else None,
            reuse=not submit.no_cache,
        )
        self.sampler = sampler
        self.pieces = pieces
        self.text = TextStream(submit.stop)
        self._work = work
        self._backend = backend
        self._logprobs: Attached[TokenLogprob] | None = None
        if submit.sampling.n_logprobs is not None:
            self._logprobs = Attached(self.text)
        # Since the last Delta: text, bytes that are to become text, and tokens.
        self._unsent = ""
        self._bytes = b""
        self._n_unsent = 0
        # Bytes become text at once where it may be the last, or logprobs go with it.
        self._is_watched = bool(submit.stop) or submit.sampling.n_logprobs is not None
        # By a token of the model's own, or by a stop string.
        self.is_over = self._is_ended_by_token = False
        self._prefilled_s: float | None = None

    def on_prefilled(self, now: float) -> Prefilled | None:
        """Return the news that the prompt is in the KV cache, the first time."""
        if self._prefilled_s is not None:
            return None
        self._prefilled_s = now
        return Prefilled(self.request, self.sequence.n_prompt, self.sequence.n_cached)

    def draw(self, row: int) -> int | None:
        """Draw a token from an output of the last decode; None: the model's own end, without text.

        What text is certain then is in the next Delta; whether it is all, `is_over` says.
        """
        token, logprob = self.sampler.sample(row)
        piece = self.pieces[token]
        if piece is None:
            self.is_over = self._is_ended_by_token = True
            self.finish()
            return None
        if logprob is not None and self._logprobs is not None:
            self._logprobs.push(logprob)
        self._n_unsent += 1
        self._bytes += piece
        if self._is_watched:
            self._read()
            if not piece:
                self._look_at_name(token)
            if self.text.stop is not None:
                self.is_over = True
                self.finish()
        return token

    def _read(self) -> None:
        if self._bytes:
            data, self._bytes = self._bytes, b""
            self._unsent += self.text.push(data)

    def _look_at_name(self, token: int) -> None:
        """End the text at a control token, which shows none, if its name is a stop string."""
        name = self._backend.piece(token, special=True).decode("utf-8", "replace")
        if name in self._work.submit.stop:
            self.finish()
            self.text.stop = name

    def finish(self) -> None:
        """Hold no text back any longer."""
        self._read()
        self._unsent += self.text.finish()

    def delta(self) -> Delta | None:
        """Return the text since the last Delta; None: there is nothing to show."""
        self._read()
        logprobs = self._logprobs.take() if self._logprobs is not None else []
        if not self._unsent and not logprobs:
            return None
        text, self._unsent = self._unsent, ""
        n_tokens, self._n_unsent = self._n_unsent, 0
        return Delta(self.request, text, n_tokens, logprobs)

    def done(self, reason: FinishReason, now: float) -> Done:
        """Return the last word on the request; call it before its slot is taken away."""
        sequence = self.sequence
        admitted_s = now if sequence.admitted_s is None else sequence.admitted_s
        prefilled_s = now if self._prefilled_s is None else self._prefilled_s
        return Done(
            self.request,
            reason,
            n_prompt=sequence.n_prompt,
            n_cached=sequence.n_cached,
            n_generated=sequence.n_generated + self._is_ended_by_token,
            queue_s=admitted_s - self._work.arrived_s,
            prefill_s=prefilled_s - admitted_s,
            decode_s=now - prefilled_s,
            stop_string=self.text.stop,
            tokens=self._shown_tokens() if self._work.submit.return_tokens else [],
        )

    def _shown_tokens(self) -> list[int]:
        """Return the prompt and the completion, without the tokens of a stop string."""
        tokens = self.sequence.tokens
        n = len(tokens)
        n_least = max(0, n - self.sequence.n_generated)
        n_cut = len(self.text.cut.encode())
        while n_cut > 0 and n > n_least:
            n_cut -= len(self.pieces[tokens[n - 1]] or b"")
            # The last one to go back may have begun before the stop string.
            n -= n_cut >= 0
        return tokens[:n]
