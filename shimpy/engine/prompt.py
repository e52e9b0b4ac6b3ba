"""From the parts of a prompt to its tokens, and into the context that there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from shimpy.engine.backend import Backend
from shimpy.errors import ContextExceededError, UnsupportedError, UserError
from shimpy.protocol.messages import Between, Fim, PromptPart, Text, Tokens


class Prompts:
    """Tokenizes prompts for one model; the reader thread's own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._is_control: dict[int, bool] = {}

    def tokenize(self, parts: Sequence[PromptPart], *, add_bos: bool) -> list[int]:
        """Return the tokens of a prompt; a prompt of nothing is the start token alone.

        Raises:
            UserError: a token id that the vocabulary does not have, or nothing at all.
            UnsupportedError: a fill-in-the-middle part for a model without such tokens.
        """
        backend = self._backend
        ids: list[int] = []
        texts: list[Text] = []
        for part in parts:
            if isinstance(part, Text):
                texts.append(part)
                continue
            ids += self._tokenize_texts(texts)
            texts.clear()
            ids += _ids_of(backend, part)
        ids += self._tokenize_texts(texts)
        wants_bos = not ids or (add_bos and backend.add_bos)
        # A template may have written the start token itself: one is enough.
        if wants_bos and backend.bos_id >= 0 and ids[:1] != [backend.bos_id]:
            ids.insert(0, backend.bos_id)
        if not ids:
            raise UserError("the prompt is empty, and the model has no start token to begin with")
        return ids

    def _tokenize_texts(self, texts: Sequence[Text]) -> list[int]:
        """Return the tokens of neighbouring texts, as if they were one wherever that is safe.

        Tokens reach over the seams between a template and what a user wrote, and the model
        was trained on such. The whole is taken when it holds just the control tokens that its
        parts hold by themselves: text that may hold none has then not brought in one.
        """
        text = "".join(t.text for t in texts)
        if not text:
            return []
        tokenize = self._backend.tokenize
        if len(texts) == 1:
            return tokenize(text, parse_special=texts[0].parse_special)
        special = [tokenize(t.text, parse_special=True) for t in texts if t.parse_special]
        whole = tokenize(text, parse_special=bool(special))
        if not special or self._controls(whole) == self._controls(chain(*special)):
            return whole
        apart = iter(special)
        parts = (
            next(apart) if t.parse_special else tokenize(t.text, parse_special=False) for t in texts
        )
        return [token for part in parts for token in part]

    def _controls(self, ids: Iterable[int]) -> list[int]:
        """Return the control tokens among these: those that show no text."""
        known = self._is_control
        controls = []
        for token in ids:
            if token not in known:
                known[token] = not self._backend.piece(token, special=False)
            if known[token]:
                controls.append(token)
        return controls


def fit_prompt(ids: list[int], *, n_ctx: int, n_keep: int, truncate: bool) -> list[int]:
    """Return a prompt that leaves room for at least one token in the context.

    Cut from a long one is its middle, after the first `n_keep` tokens, in blocks of half of
    what is left of the context: as a conversation grows the cut stays where it is for many
    turns, and the KV cache with it (llama.cpp, tools/server/server.cpp, truncation of the
    prompt).

    Raises:
        ContextExceededError: it is too long and may not be cut.
    """
    if len(ids) < n_ctx:
        return ids
    if not truncate:
        raise ContextExceededError(
            f"the prompt has {len(ids)} tokens, and the context holds {n_ctx} with at least one "
            f"for the answer; shorten the prompt or raise num_ctx",
            n_prompt=len(ids),
            n_ctx=n_ctx,
        )
    n_keep = min(n_keep if n_keep >= 0 else n_ctx, n_ctx // 2)
    n_block = (n_ctx - n_keep) // 2
    n_cut = (len(ids) - n_keep - n_block) // n_block * n_block
    return ids[:n_keep] + ids[n_keep + n_cut :]


def check_ids(backend: Backend, ids: list[int]) -> list[int]:
    """Return the ids; llama.cpp refuses a whole batch for one that it doesn't know.

    Raises:
        UserError: an id is not in the vocabulary.
    """
    for token in ids:
        if not 0 <= token < backend.n_vocab:
            raise UserError(
                f"token id {token} is not in the vocabulary, which has 0 to {backend.n_vocab - 1}"
            )
    return ids


def _ids_of(backend: Backend, part: Tokens | Fim | Between) -> list[int]:
    match part:
        case Tokens(ids=ids):
            return check_ids(backend, ids)
        case Fim():
            return [_fim_id(backend, part)]
        case Between():
            return backend.between_ids


def _fim_id(backend: Backend, part: Fim) -> int:
    token = backend.fim_token(part.role)
    if token < 0:
        raise UnsupportedError(
            f"the model has no fill-in-the-middle token for the {part.role}: it can't insert"
        )
    return token
