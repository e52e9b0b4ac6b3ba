"""A model's vocabulary: text to tokens and back.

All of it may be called from any thread while the model decodes: llama.cpp's vocabulary does
not change, and each call has its own buffer.
"""

from __future__ import annotations

import ctypes
import re
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shimpy.engine.backend import FimRole
from shimpy.engine.llama.library import LL, Pointer, bind_quick
from shimpy.errors import WorkerError

# llama.h, enum llama_token_attr.
ATTR_NORMAL = 1 << 2
_ATTR_CONTROL = 1 << 3
# llama.h, enum llama_vocab_type.
_NO_VOCAB = 0

# Some of llama.cpp's pre-tokenizers are std::regex, which recurses once a character: 300 bytes
# of stack each, so that 27,000 letters without a space overflow 8 MiB (measured).
_MAX_RUN = 8000
_SPACES = re.compile(r"\s{2,}")
_RUN = re.compile(r"\S+|\s+")
_WORD_END = re.compile(r"(?<=\w)(?!\w)")

_PIECE_BYTES = 128

_tokenize = LL.llama_tokenize
_PIECE_REST = (ctypes.c_int32, ctypes.c_int32, ctypes.c_bool)
_to_piece = bind_quick(
    "llama_token_to_piece",
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_char_p,
    *_PIECE_REST,
)
_to_piece_at = bind_quick(
    "llama_token_to_piece",
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_void_p,
    *_PIECE_REST,
)
_is_eog = bind_quick("llama_vocab_is_eog", ctypes.c_bool, ctypes.c_void_p, ctypes.c_int32)
_get_attr = bind_quick("llama_vocab_get_attr", ctypes.c_int, ctypes.c_void_p, ctypes.c_int32)


class Vocab:
    """The vocabulary of a loaded model; lives as long as the model."""

    def __init__(self, handle: Pointer) -> None:
        self.handle = handle
        self.n_tokens: int = LL.llama_vocab_n_tokens(handle)
        self.bos_id: int = LL.llama_vocab_bos(handle)
        self.eos_id: int = LL.llama_vocab_eos(handle)
        self.add_bos: bool = LL.llama_vocab_get_add_bos(handle) and self.bos_id >= 0
        self._fim: dict[FimRole, int] = {
            "prefix": LL.llama_vocab_fim_pre(handle),
            "suffix": LL.llama_vocab_fim_suf(handle),
            "middle": LL.llama_vocab_fim_mid(handle),
            "repo": LL.llama_vocab_fim_rep(handle),
            "separator": LL.llama_vocab_fim_sep(handle),
        }
        self._shown: dict[int, bytes] = {}
        self._plain: dict[int, bytes] = {}

    @property
    def exists(self) -> bool:
        """Whether the file has a tokenizer; llama.cpp aborts when one that it lacks is used."""
        return bool(LL.llama_vocab_type(self.handle) != _NO_VOCAB)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that llama.cpp puts behind a whole text."""
        frame = self._tokenize_part("", add_special=True, parse_special=False)
        return frame[1:] if self.add_bos and frame[:1] == [self.bos_id] else frame

    @property
    def between_ids(self) -> list[int]:
        """Tokens between two texts to compare.

        Source: llama.cpp, tools/server/server-common.cpp, format_prompt_rerank.
        """
        handle = self.handle
        sep: int = LL.llama_vocab_sep(handle)
        end = self.eos_id if self.eos_id >= 0 else sep
        ids = [end] * LL.llama_vocab_get_add_eos(handle) + [sep] * LL.llama_vocab_get_add_sep(
            handle
        )
        return [token for token in ids if token >= 0]

    @property
    def has_fim(self) -> bool:
        """Whether the middle of a text can be asked for."""
        return min(self._fim["prefix"], self._fim["suffix"], self._fim["middle"]) >= 0

    def fim_token(self, role: FimRole) -> int:
        """Return a fill-in-the-middle token; -1: the model has none."""
        return self._fim[role]

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Return the text's tokens, without start or end tokens."""
        parts = split_long_runs(text) if len(text) > _MAX_RUN else [text]
        ids: list[int] = []
        for part in parts:
            ids += self._tokenize_part(part, add_special=False, parse_special=parse_special)
        return ids

    def _tokenize_part(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        # Lone surrogates come from JSON escapes; UTF-8 has no bytes for them.
        data = text.encode(errors="replace")
        size = len(data) + 8
        while True:
            ids = np.empty(size, np.int32)
            pointer = ids.ctypes.data_as(LL.llama_token_p)
            n = _tokenize(self.handle, data, len(data), pointer, size, add_special, parse_special)
            if n >= 0:
                found: list[int] = ids[:n].tolist()
                return found
            # A byte can become more than one token (normalizing tokenizers).
            size = -n

    def piece(self, token: int, *, special: bool) -> bytes:
        """Return the token's bytes; those of a control token are empty unless `special`.

        Raises:
            WorkerError: there is no such token.
        """
        cache = self._shown if special else self._plain
        found = cache.get(token)
        if found is None:
            found = cache[token] = self._read_piece(token, special=special)
        return found

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        # llama.cpp throws through ctypes, which ends the process.
        if not 0 <= token < self.n_tokens:
            raise WorkerError(f"there is no token {token}: the model has {self.n_tokens}")
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = _to_piece(self.handle, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def first_bytes(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Return the first byte of every token's piece, control tokens shown, and its length."""
        # Most pieces fit; only the first byte of the others is missing then.
        room = 16
        pieces = np.zeros((self.n_tokens, room), np.uint8)
        start = pieces.ctypes.data
        handle = self.handle
        sizes = np.array(
            [
                _to_piece_at(handle, token, start + room * token, room, 0, True)  # noqa: FBT003
                for token in range(self.n_tokens)
            ],
            np.int32,
        )
        for token in np.flatnonzero(sizes < 0).tolist():
            pieces[token, 0] = self._read_piece(token, special=True)[0]
        return pieces[:, 0].copy(), np.abs(sizes)

    def all_attributes(self) -> npt.NDArray[np.int32]:
        """Return the llama_token_attr bits of every token."""
        return np.array([_get_attr(self.handle, t) for t in range(self.n_tokens)], np.int32)

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return bool(_is_eog(self.handle, token))

    @cached_property
    def eog_ids(self) -> list[int]:
        """All tokens that end a generation; takes some milliseconds the first time."""
        return [token for token in range(self.n_tokens) if _is_eog(self.handle, token)]

    def is_control(self, token: int) -> bool:
        """Whether the token stands for no text; the token must exist."""
        return bool(_get_attr(self.handle, token) & _ATTR_CONTROL)


def split_long_runs(text: str) -> list[str]:
    """Cut a text so that no run of spaces or of other characters is over 8,000 long.

    Cuts are made behind a word's end where the run has one: tokenizers cut there too.
    """
    if max(map(len, text.split()), default=0) <= _MAX_RUN and not any(
        match.end() - match.start() > _MAX_RUN for match in _SPACES.finditer(text)
    ):
        return [text]
    parts = []
    start = 0
    for match in _RUN.finditer(text):
        at = match.start()
        while match.end() - at > _MAX_RUN:
            at = _last_word_end(text, at, at + _MAX_RUN)
            parts.append(text[start:at])
            start = at
    return [*parts, text[start:]]


def _last_word_end(text: str, start: int, stop: int) -> int:
    ends = [match.start() for match in _WORD_END.finditer(text, start + 1, stop)]
    # The window's own end looks like a word's end.
    return max((end for end in ends if end < stop), default=stop)
