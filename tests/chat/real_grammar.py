"""llama.cpp's own grammar engine, asked which texts a grammar lets through."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Self

import llama_cpp.llama_cpp as lib

_MINUS_INFINITY = float("-inf")


class Vocabulary:
    """The vocabulary of a model file; its weights are not loaded."""

    def __init__(self, path: Path) -> None:
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        assert self._model
        self.pointer = lib.llama_model_get_vocab(self._model)
        self.size = lib.llama_vocab_n_tokens(self.pointer)
        self.eos = lib.llama_vocab_eos(self.pointer)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = lib.llama_tokenize(self.pointer, data, len(data), ids, len(ids), False, special)
        assert n >= 0
        return list(ids[:n])

    def ends(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self.pointer, token))

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = lib.llama_token_to_piece(self.pointer, token, buffer, 256, 0, True)
        return buffer.raw[:n]

    def close(self) -> None:
        lib.llama_model_free(self._model)


class Grammar:
    """A compiled grammar; `ok` where llama.cpp could parse it."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        self._vocabulary = vocabulary
        self._sampler = lib.llama_sampler_init_grammar(vocabulary.pointer, text.encode(), b"root")
        self.ok = bool(self._sampler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ok:
            lib.llama_sampler_free(self._sampler)

    def allowed(self, tokens: list[int]) -> list[int]:
        """Which of these tokens may come next."""
        data = (lib.llama_token_data * len(tokens))()
        for i, token in enumerate(tokens):
            data[i] = lib.llama_token_data(id=token, logit=0.0, p=0.0)
        array = lib.llama_token_data_array(data=data, size=len(tokens), selected=-1, sorted=False)
        lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return [data[i].id for i in range(len(tokens)) if data[i].logit != _MINUS_INFINITY]

    def accepts(self, text: str) -> bool:
        """Whether exactly this text may be the whole answer; usable once."""
        for token in self._vocabulary.tokenize(text):
            if not self.allowed([token]):
                return False
            lib.llama_sampler_accept(self._sampler, token)
        return bool(self.allowed([self._vocabulary.eos]))

    def random_text(self, seed: int, *, max_tokens: int = 400) -> str | None:
        """A text that a model with random weights may write; None: it found no end in time.

        Tokens that close something are liked better, or texts would hardly ever end.
        """
        chance = random.Random(seed)
        vocabulary = self._vocabulary
        out = b""
        for _ in range(max_tokens):
            allowed = self.allowed(list(range(vocabulary.size)))
            assert allowed, f"no token may follow {out!r}"
            going_on = [token for token in allowed if not vocabulary.ends(token)]
            if not going_on or (len(going_on) < len(allowed) and chance.random() < 0.5):
                return out.decode()
            plain = [token for token in going_on if vocabulary.piece(token).isascii()] or going_on
            closing = [
                token for token in plain if vocabulary.piece(token)[:1] in (b'"', b"}", b"]")
            ]
            token = chance.choice(closing if closing and chance.random() < 0.5 else plain)
            out += vocabulary.piece(token)
            lib.llama_sampler_accept(self._sampler, token)
        return None
