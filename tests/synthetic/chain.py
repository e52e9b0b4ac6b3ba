"""A model that answers every prompt with one known text, then ends.

Attention and MLP are zero, so that the logits depend on the last token alone; embeddings are
one-hot, and output.weight maps each token of the text to the next one, the last to </s>
(`endless`: to the first), and every other token to the first.

The text's tokens have no merges, so that no prompt is tokenized to them: the answer always
starts at its beginning. Characters outside ASCII are cut after their first byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from tests.synthetic.gguf_file import GgufFile
from tests.synthetic.vocabulary import (
    CHATML,
    SPECIALS,
    USER_DEFINED,
    Vocabulary,
    bpe_vocabulary,
    byte_alphabet,
)

CHAIN_TEXT = "Once upon a time in 日本, a naïve 🙂 fox said: “wörld” and left. The end."

_N_HEAD_SIZE = 32
_N_FF = 32
# The next token's logit over all others: certain at any usual temperature.
_LOGIT = 40.0
_N_MERGED = 200


def write_chain(
    path: Path,
    text: str = CHAIN_TEXT,
    *,
    endless: bool = False,
    n_ctx_train: int = 4096,
    chat_template: str | None = CHATML,
    add_bos: bool = True,
) -> Path:
    """Write the model that says `text`; `endless`: over and over."""
    alphabet = byte_alphabet()
    extra = ["".join(alphabet[byte] for byte in piece) for piece in chain_pieces(text)]
    n_plain = len(alphabet) + len(SPECIALS) + len(USER_DEFINED) + _N_MERGED
    n_vocab = -(-(n_plain + len(extra)) // 64) * 64
    vocabulary = bpe_vocabulary(n_vocab, extra=extra)
    file = GgufFile(path, "llama")
    _add_keys(file, n_vocab, n_ctx_train)
    vocabulary.add_to(file.writer, add_bos=add_bos, chat_template=chat_template)
    _add_tensors(file, _next_tokens(vocabulary, len(extra), endless=endless))
    return file.write()


def chain_pieces(text: str) -> list[bytes]:
    """Return the bytes of each token of the text; no two are equal, none is a plain token."""
    plain = {token.encode() for token in (*SPECIALS, *USER_DEFINED)}
    plain |= {merge.replace(" ", "").encode() for merge in bpe_vocabulary(n_vocab=800).merges}
    seen: set[bytes] = set()
    pieces = []
    current = b""
    for cut in _cuts(text):
        current += cut
        if len(current) > 1 and current not in seen and _as_token(current) not in plain:
            pieces.append(current)
            seen.add(current)
            current = b""
    if current:
        pieces = [*pieces[:-1], (pieces[-1] if pieces else b"") + current]
    if len(set(pieces)) != len(pieces):
        message = f"{text!r} can't be cut into different tokens"
        raise ValueError(message)
    return pieces


def _cuts(text: str) -> list[bytes]:
    """Cut before each space and after the first byte of each character outside ASCII."""
    cuts = [b""]
    for character in text:
        data = character.encode()
        if character == " ":
            cuts.append(data)
        elif len(data) == 1:
            cuts[-1] += data
        else:
            cuts[-1] += data[:1]
            cuts.append(data[1:])
    return [cut for cut in cuts if cut]


def _as_token(piece: bytes) -> bytes:
    return piece.replace(b" ", "Ġ".encode())


def _next_tokens(vocabulary: Vocabulary, n_chain: int, *, endless: bool) -> list[int]:
    n_vocab = len(vocabulary.tokens)
    first = n_vocab - n_chain
    following = [first] * first + list(range(first + 1, n_vocab))
    following.append(first if endless else vocabulary.id_of("</s>"))
    return following


def _add_keys(file: GgufFile, n_vocab: int, n_ctx_train: int) -> None:
    writer = file.writer
    writer.add_name("synthetic chain")
    writer.add_file_type(0)
    writer.add_block_count(1)
    writer.add_context_length(n_ctx_train)
    writer.add_embedding_length(n_vocab)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(_N_HEAD_SIZE)
    writer.add_value_length(_N_HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(_N_HEAD_SIZE)
    writer.add_vocab_size(n_vocab)


def _add_tensors(file: GgufFile, following: list[int]) -> None:
    n = len(following)
    output = np.zeros((n, n), np.float32)
    # The norm makes a one-hot row sqrt(n) high.
    output[following, np.arange(n)] = _LOGIT / np.sqrt(n)
    _add(file, "token_embd.weight", np.eye(n, dtype=np.float32))
    _add(file, "output_norm.weight", np.ones(n, np.float32))
    _add(file, "output.weight", output)
    _add(file, "blk.0.attn_norm.weight", np.ones(n, np.float32))
    _add(file, "blk.0.ffn_norm.weight", np.ones(n, np.float32))
    for name in ("attn_q", "attn_k", "attn_v"):
        _add(file, f"blk.0.{name}.weight", np.zeros((_N_HEAD_SIZE, n), np.float32))
    _add(file, "blk.0.attn_output.weight", np.zeros((n, _N_HEAD_SIZE), np.float32))
    for name in ("ffn_gate", "ffn_up"):
        _add(file, f"blk.0.{name}.weight", np.zeros((_N_FF, n), np.float32))
    _add(file, "blk.0.ffn_down.weight", np.zeros((n, _N_FF), np.float32))


def _add(file: GgufFile, name: str, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    # The two square ones in half precision: a file of 1.5 MB.
    is_square = values.ndim == 2 and values.shape[0] == values.shape[1]
    kind = GgmlType.F16 if is_square else GgmlType.F32
    data = values.astype(np.float16 if is_square else np.float32)
    file.add(name, kind, values.shape, lambda: iter([data.view(np.uint8)]))
