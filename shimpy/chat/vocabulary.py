"""Which tokens of a vocabulary are control tokens, as llama.cpp sees them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from shimpy.chat.fim import FimOrder, FimRole

# gguf token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_UNKNOWN = 2
_CONTROL = 3
# llama.cpp makes these control tokens by their text, whatever type the file gives them
# (src/llama-vocab.cpp: the end-of-turn, end-of-message and fill-in-the-middle tokens).
_END_TEXTS = frozenset(
    """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <turn|>
    <|endoftext|> <|end_of_text|> </s> <|eom_id|> <EOT> _<EOT> <|EOT|> <|eot|> [e~[
    <｜end▁of▁sentence｜> <end_of_utterance>
    """.split()  # noqa: SIM905 - easier to read
)
_FIM_TEXTS: dict[FimRole, tuple[str, ...]] = {
    "prefix": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "suffix": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "middle": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "repo": (
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
    ),
    "separator": ("<|file_sep|>",),
}
_PAD_TEXTS = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>")
_FIM_KEYS: dict[FimRole, tuple[str, ...]] = {
    "prefix": ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"),
    "suffix": ("tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"),
    "middle": ("tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"),
    "repo": ("tokenizer.ggml.fim_rep_token_id",),
    "separator": ("tokenizer.ggml.fim_sep_token_id",),
}
# shimpy's own, since no key of others tells it; the demo model has it.
FIM_ORDER_KEY = "shimpy.fim_order"
_BY_TEXT = _END_TEXTS.union(_PAD_TEXTS, *_FIM_TEXTS.values())


def fim_roles(tokens: Iterable[str], keys: Container[str]) -> frozenset[FimRole]:
    """Return the fill-in-the-middle tokens of a vocabulary, as llama.cpp finds them.

    `keys` are the file's metadata keys, which may name the tokens; else their texts tell.
    """
    role_of = {text: role for role, texts in _FIM_TEXTS.items() for text in texts}
    by_text = {role_of[token] for token in tokens if token in role_of}
    by_key = {role for role, names in _FIM_KEYS.items() if any(name in keys for name in names)}
    return frozenset(by_text | by_key)


def fim_order(value: str) -> FimOrder:
    """Return the order that FIM_ORDER_KEY names; that of nearly all models where it names none."""
    return "suffix-first" if value == "suffix-first" else "prefix-first"


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
