"""Turns documents and snippets into the token stream of one pass over the data.

Each pass is drawn anew from its seed: which files are read whole and which as fill-in-the-middle
samples (cut at fresh places), which functions stand alone, and how chats ask for them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from corpus import Document, Snippet
from tokenizers import Tokenizer
from vocabulary import (
    END_OF_TEXT,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    IM_END,
    IM_START,
)

# Sources that are read whole in a pass; the others become fill-in-the-middle samples.
_WHOLE_SHARE = 0.55
# Characters of one fill-in-the-middle sample, so that prefix, suffix and middle fit a window.
_FIM_CHARS = (300, 6000)
# Half of the middles are short, as an editor's cursor asks for; half end anywhere.
_SHORT_MIDDLE_CHARS = 240
# Passes over each kind in one pass over all: tests are two thirds of the text.
_REPEATS = {"module": 2, "prose": 1, "test": 1}
# Shares of the snippets that a pass shows on their own, and in chats.
_ALONE_SHARE = {"module": 0.8, "test": 0.3}
_CHAT_SHARE = {"module": 0.6, "test": 0.2}
# Characters of a prompt and its answer together, where the model is tuned on such pairs.
_SHORT_CHARS = (60, 900)
# Share of the functions on their own that carry another one's name: bodies must not hang on
# names alone, and a recursive call must copy the name that the prompt gave.
_RENAMED_SHARE = 0.2

_ASK_BY_SUMMARY = (
    "Write a Python function `{name}`: {summary}",
    "Write {name}. {summary}",
    "Implement this in Python: {summary}",
    "{summary}",
)
_ASK_BY_HEADER = ("{header}", "{header}", "Complete this:\n{header}", "Write `{header}`")
_ASK_BY_NAME = ("Write a Python function {name}.", "Write {name} in Python.", "{name}")
_ASK_MEANING = ("What does this do?\n\n{source}", "Explain this code:\n\n{source}")


def render_chat(messages: Iterable[tuple[str, str]], *, add_generation_prompt: bool = False) -> str:
    """Returns (role, content) pairs as CHAT_TEMPLATE renders them."""
    turns = "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)
    return f"{turns}{IM_START}assistant\n" if add_generation_prompt else turns


# What render_chat does, as the Jinja template that the model file carries.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sample_texts(
    documents: Sequence[Document], snippets: Sequence[Snippet], seed: int
) -> Iterator[str]:
    """Yields the texts of one pass, shuffled; special tokens are spelled out in them."""
    rng = random.Random(seed)
    makers: list[Callable[[], Iterator[str]]] = []
    for document in documents:
        for _ in range(_REPEATS[document.kind]):
            is_whole = document.kind == "prose" or rng.random() < _WHOLE_SHARE
            make = _whole if is_whole else _fim_pieces
            makers.append(lambda make=make, text=document.text: make(text, rng))
    names = [snippet.name for snippet in snippets if snippet.stands_alone]
    for snippet in snippets:
        if snippet.stands_alone and rng.random() < _ALONE_SHARE[snippet.kind]:
            makers.append(lambda snippet=snippet: _alone(snippet, names, rng))
        if rng.random() < _CHAT_SHARE[snippet.kind]:
            makers.append(lambda snippet=snippet: _chat(snippet, rng))
    rng.shuffle(makers)
    for make in makers:
        yield from make()


def prompt_samples(
    documents: Sequence[Document], snippets: Sequence[Snippet], seed: int
) -> Iterator[tuple[str, str]]:
    """Yields (prompt, answer) pairs without end, cut where people and editors cut.

    Prompt and answer are to be tokenized apart, as they are in use: a prompt that ends in `:`
    ends in another token than the same text does with its line end. Most pairs are short
    fill-in-the-middle samples: what follows FIM_MIDDLE is one token in hundreds of a long one,
    too few to learn from. A tenth is plain text in long pieces, so that it is not forgotten.
    """
    rng = random.Random(seed)
    sources = [d for d in documents if d.kind != "prose"]
    weights = [len(d.text) * _REPEATS[d.kind] for d in sources]
    short = [s for s in snippets if s.kind == "module" and len(s.source) <= _SHORT_CHARS[1]]
    alone = [s for s in snippets if s.stands_alone and len(s.source) <= _SHORT_CHARS[1]]
    names = [s.name for s in alone]
    while True:
        kind = rng.random()
        if kind < 0.25:
            yield _completion_pair(rng.choice(alone), names, rng)
        elif kind < 0.4:
            yield _chat_pair(rng.choice(short), rng)
        else:
            text = rng.choices(sources, weights)[0].text
            yield (
                _fim_pair(_excerpt(text, _SHORT_CHARS, rng), rng)
                if kind < 0.9
                else (
                    "",
                    _excerpt(text, _FIM_CHARS, rng),
                )
            )


def gap_prompt(prefix: str, suffix: str) -> str:
    """Returns the prompt for the text between: the order of llama-server's --spm-infill."""
    return f"{FIM_SUFFIX}{suffix}{FIM_PREFIX}{prefix}{FIM_MIDDLE}"


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> npt.NDArray[np.uint16]:
    """Returns the texts as one row of token ids, END_OF_TEXT before each and at the end."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts: list[npt.NDArray[np.uint16]] = []
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 1024:
            parts += _encode(tokenizer, batch, end)
            batch.clear()
    parts += _encode(tokenizer, batch, end)
    return np.concatenate([*parts, np.array([end], np.uint16)])


def _encode(tokenizer: Tokenizer, batch: list[str], end: int) -> list[npt.NDArray[np.uint16]]:
    return [np.array([end, *e.ids], np.uint16) for e in tokenizer.encode_batch_fast(batch)]


def _whole(text: str, _rng: random.Random) -> Iterator[str]:
    yield text


def _alone(snippet: Snippet, names: Sequence[str], rng: random.Random) -> Iterator[str]:
    yield _renamed(snippet, names, rng)


def _renamed(snippet: Snippet, names: Sequence[str], rng: random.Random) -> str:
    if rng.random() >= _RENAMED_SHARE:
        return snippet.source
    return re.sub(rf"\b{re.escape(snippet.name)}\b", rng.choice(names), snippet.source)


def _fim_pieces(text: str, rng: random.Random) -> Iterator[str]:
    """Cuts a file at line ends into samples and a hole into each (prefix, suffix, middle)."""
    start = 0
    while start < len(text):
        end = _line_end(text, start + _length(_FIM_CHARS, rng))
        yield _fim(text[start:end], rng)
        start = end


def _fim(text: str, rng: random.Random) -> str:
    begin = rng.randrange(len(text) + 1)
    if rng.random() < 0.5:
        end = min(len(text), begin + rng.randrange(1, _SHORT_MIDDLE_CHARS))
    else:
        begin, end = sorted((begin, rng.randrange(len(text) + 1)))
    return f"{FIM_PREFIX}{text[:begin]}{FIM_SUFFIX}{text[end:]}{FIM_MIDDLE}{text[begin:end]}"


def _chat(snippet: Snippet, rng: random.Random) -> Iterator[str]:
    yield "".join(_chat_pair(snippet, rng)) + "\n"


def _chat_pair(snippet: Snippet, rng: random.Random) -> tuple[str, str]:
    """One question about a function, answered with its code, or its code explained."""
    # A snippet without words can only be asked for by its header or name.
    kind = rng.uniform(0 if snippet.summary else 0.5, 1)
    facts = {
        "name": snippet.name,
        "header": snippet.header,
        "summary": snippet.summary,
        "source": snippet.source.rstrip(),
    }
    if kind < 0.15:
        question, answer = rng.choice(_ASK_MEANING), snippet.summary
    else:
        asks = _ASK_BY_SUMMARY if kind < 0.5 else _ASK_BY_HEADER if kind < 0.85 else _ASK_BY_NAME
        question, answer = rng.choice(asks), snippet.source.rstrip()
    prompt = render_chat([("user", question.format(**facts))], add_generation_prompt=True)
    return prompt, f"{answer}{IM_END}"


def _completion_pair(snippet: Snippet, names: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Cuts a function after its header, with or without the line end, or anywhere."""
    source = _renamed(snippet, names, rng)
    # A new name moves the header's end within its line, not to another line.
    before, header, _ = snippet.source.partition(snippet.header)
    lines = source.splitlines(keepends=True)[: 1 + (before + header).count("\n")]
    header_end = len("".join(lines).rstrip())
    kind = rng.random()
    cut = header_end if kind < 0.6 else header_end + 1 if kind < 0.8 else rng.randrange(len(source))
    return source[:cut], source[cut:] + END_OF_TEXT


def _excerpt(text: str, n_chars: tuple[int, int], rng: random.Random) -> str:
    """Some whole lines out of a file."""
    start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
    return text[start : _line_end(text, start + _length(n_chars, rng))]


def _length(n_chars: tuple[int, int], rng: random.Random) -> int:
    """Log-uniform: short samples are many, long ones hold as much text."""
    low, high = n_chars
    return int(low * (high / low) ** rng.random())


def _line_end(text: str, position: int) -> int:
    return text.find("\n", position) + 1 or len(text)


def _fim_pair(text: str, rng: random.Random) -> tuple[str, str]:
    """A hole in the text, from anywhere to the line's end or anywhere near.

    The suffix comes first, so that the answer goes on where the prefix ends: the first stage has
    the prefix first, and a model of this size did not learn to look back over the suffix.
    """
    begin = rng.randrange(len(text))
    line_end = text.find("\n", begin)
    near = begin + rng.randrange(1, _SHORT_MIDDLE_CHARS)
    end = line_end if rng.random() < 0.5 and line_end >= 0 else near
    return gap_prompt(text[:begin], text[end:]), text[begin:end] + END_OF_TEXT
