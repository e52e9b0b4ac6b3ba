"""Tokenizers of synthetic models: byte-level BPE with control tokens, and WordPiece."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGUFWriter, TokenType

# Control tokens, in the order of their ids behind the byte tokens; llama.cpp recognises the
# fill-in-the-middle ones and those that end a generation by their text.
SPECIALS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_call>",
    "</tool_call>",
)
# Tokens that are matched in any text and shown like text, as Qwen's thinking marks are.
USER_DEFINED = ("<think>", "</think>")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

N_BYTES = 256
# English letters by how common they are: small vocabularies then merge real text.
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_SPACE = "Ġ"


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in GPT-2's vocabulary files.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(b) if b in printable else chr(next(spare)) for b in range(N_BYTES)]


@dataclass(frozen=True)
class Vocabulary:
    """Token texts in GPT-2's byte alphabet, with their types, and the merges."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    # Which rules cut a text into words, before merging; one of llama.cpp's names.
    pre: str = "default"

    def id_of(self, text: str) -> int:
        """Return the id of a token by its text in the file."""
        return self.tokens.index(text)

    @property
    def muted(self) -> list[int]:
        """Ids that random weights should not choose: control tokens and odd bytes."""
        printable = {*range(32, 127), 10}
        odd_bytes = [b for b in range(N_BYTES) if b not in printable]
        return odd_bytes + list(range(N_BYTES, N_BYTES + len(SPECIALS) + len(USER_DEFINED)))

    def add_to(self, writer: GGUFWriter, *, add_bos: bool, chat_template: str | None) -> None:
        """Write the tokenizer's keys."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.id_of("<s>"))
        writer.add_eos_token_id(self.id_of("</s>"))
        writer.add_add_bos_token(add_bos)
        if chat_template is not None:
            writer.add_chat_template(chat_template)


def bpe_vocabulary(n_vocab: int, *, extra: Sequence[str] = (), pre: str = "default") -> Vocabulary:
    """Return `n_vocab` tokens: bytes, control tokens, made-up merges, then `extra`.

    The `extra` tokens have no merges, so no text is ever tokenized to them.
    """
    tokens = byte_alphabet() + list(SPECIALS) + list(USER_DEFINED)
    types = [TokenType.NORMAL] * N_BYTES
    types += [TokenType.CONTROL] * len(SPECIALS) + [TokenType.USER_DEFINED] * len(USER_DEFINED)
    n_merged = n_vocab - len(tokens) - len(extra)
    if n_merged < 1:
        message = f"{n_vocab} tokens are too few: {len(tokens) + len(extra) + 1} at least"
        raise ValueError(message)
    # llama.cpp aborts on a model with no merge and on duplicate tokens.
    merges = list(itertools.islice(_merges(), n_merged))
    if len(merges) < n_merged:
        message = f"{n_vocab} tokens are too many: {n_vocab - n_merged + len(merges)} at most"
        raise ValueError(message)
    tokens += [merge.replace(" ", "") for merge in merges] + list(extra)
    types += [TokenType.NORMAL] * (n_vocab - len(types))
    return Vocabulary(tokens, types, merges, pre)


def _merges() -> itertools.chain[str]:
    """Yield merges whose results are all different: pairs, then pairs of pairs."""
    pairs = sorted(
        itertools.product(_LETTERS, repeat=2),
        key=lambda pair: _LETTERS.index(pair[0]) + _LETTERS.index(pair[1]),
    )
    words = ["".join(pair) for pair in pairs]
    return itertools.chain(
        (f"{_SPACE} {letter}" for letter in _LETTERS),
        (f"{first} {second}" for first, second in pairs),
        (f"{_SPACE} {word}" for word in words),
        (f"{first} {second}" for first, second in itertools.product(words, repeat=2)),
    )


def add_wordpiece(writer: GGUFWriter, n_vocab: int) -> None:
    """Write the keys of a BERT tokenizer: word starts marked by U+2581, continuations bare."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = ("".join(word) for word in itertools.product(_LETTERS, repeat=3))
    tokens = specials + [f"▁{c}" for c in characters] + characters
    for word in itertools.islice(words, max(0, (n_vocab - len(tokens)) // 2)):
        tokens += [f"▁{word}", word]
    tokens += [f"[unused{i}]" for i in range(n_vocab - len(tokens))]
    types = [TokenType.CONTROL] * len(specials) + [TokenType.NORMAL] * (n_vocab - len(specials))
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens[:n_vocab])
    writer.add_token_types(types)
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
