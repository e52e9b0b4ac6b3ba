"""Which tokens of a vocabulary are control tokens, as llama.cpp sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# gguf token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_UNKNOWN = 2
_CONTROL = 3
# llama.cpp makes these control tokens by their text, whatever type the file gives them
# (src/llama-vocab.cpp: the end-of-turn, end-of-message and fill-in-the-middle tokens).
_BY_TEXT = frozenset(
    """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <turn|>
    <|endoftext|> <|end_of_text|> </s> <|eom_id|> <EOT> _<EOT> <｜end▁of▁sentence｜>
    <end_of_utterance> <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE>
    <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF>
    ▁<SUF> <|code_suffix|> <|suffix|> <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜>
    <MID> ▁<MID> <|code_middle|> <|middle|> <|fim_pad|> <fim-pad> <fim_pad> <PAD> <|fim_repo|>
    <|repo_name|> <fim-repo> <fim_repo> <REPO> <reponame> <|file_sep|> <|file_separator|>
    """.split()  # noqa: SIM905 - easier to read
)


def control_tokens(tokens: Iterable[str], types: Sequence[int] | None) -> list[str]:
    """Return the texts that the tokenizer turns into control tokens when it looks for them.

    `types` are tokenizer.ggml.token_type; None where the file has none. User-defined tokens
    are not among them: llama.cpp recognises those in every text.
    """
    if types is None:
        return [token for token in tokens if token in _BY_TEXT]
    return [
        token
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _UNKNOWN) or (token in _BY_TEXT)
    ]
