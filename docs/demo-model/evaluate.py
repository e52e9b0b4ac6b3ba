"""Bits per byte of the finished file on the held-out modules, beside xz -9 on the same text.

The model runs in llama.cpp, as users run it. Each file is one text: its tokens, cut into
windows of the training context that begin with the end-of-text token and overlap by half; a
token is scored in the first window that holds it, so all but the first half window of a file
see at least half a context. xz gets all files of a group as one stream, so it may use every
file before. Bits per byte is the sum of -log2 p over all tokens, divided by the UTF-8 bytes.

Then gaps in held-out modules, from some place in a line to its end: the bits of what was there,
given what is before it, and given the suffix as well.
"""

from __future__ import annotations

import ctypes
import lzma
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt
from corpus import Document
from samples import gap_prompt

# One: threads that wait for each other stall on a busy machine.
_N_THREADS = 1
_N_GAPS = 400
# Characters before and after a gap.
_AROUND_GAP = 400


def evaluate(model_path: Path, documents: list[Document]) -> None:
    """Prints one line per group of held-out files: its bytes, and both bits per byte."""
    groups = {
        "modules": [d.text for d in documents if d.split == "held-out" and d.kind == "module"],
        "their tests": [d.text for d in documents if d.split == "held-out" and d.kind == "test"],
    }
    groups["both"] = [text for texts in groups.values() for text in texts]
    model = LlamaModel(model_path)
    bits = {text: model.bits(text) for text in groups["both"]}
    print(f"{'held-out':12}{'files':>6}{'bytes':>12}{'xz -9':>9}{'model':>9}  bits per byte")
    for name, texts in groups.items():
        n_bytes = sum(len(text.encode()) for text in texts)
        xz = 8 * len(lzma.compress("".join(texts).encode(), preset=9)) / n_bytes
        ours = sum(bits[text] for text in texts) / n_bytes
        print(f"{name:12}{len(texts):6}{n_bytes:12,}{xz:9.4f}{ours:9.4f}")
    _evaluate_gaps(model, groups["modules"])


def _evaluate_gaps(model: LlamaModel, texts: list[str]) -> None:
    """Prints how well gaps are filled, without and with what comes after them."""
    gaps = list(islice(_gaps(texts, random.Random(1)), _N_GAPS))
    n_bytes = sum(len(gap.encode()) for _, gap, _ in gaps)
    print(f"{len(gaps)} gaps, {n_bytes:,} bytes: bits per byte, first token right")
    for name, prompt in (
        ("prefix alone", lambda prefix, _: model.tokenize(prefix)),
        (
            "and suffix",
            lambda prefix, suffix: model.tokenize(gap_prompt(prefix, suffix), parse_special=True),
        ),
    ):
        answers = [model.answer(prompt(prefix, suffix), gap) for prefix, gap, suffix in gaps]
        bits = sum(bits for bits, _ in answers) / n_bytes
        n_right = sum(is_right for _, is_right in answers)
        print(f"{name:12}{bits:9.4f}{n_right:6} of {len(gaps)}")


def _gaps(texts: list[str], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yields (prefix, gap, suffix) without end; gaps are of four characters or more."""
    while True:
        text = rng.choice(texts)
        begin = rng.randrange(len(text))
        end = text.find("\n", begin)
        if end - begin >= 4:
            prefix = text[max(0, begin - _AROUND_GAP) : begin]
            yield prefix, text[begin:end], text[end : end + _AROUND_GAP]


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens to decode after the end-of-text token; the first n_known were scored before."""

    tokens: npt.NDArray[np.int32]
    n_known: int


class LlamaModel:
    """A model file in llama.cpp, on the CPU, for scoring texts."""

    def __init__(self, path: Path) -> None:
        """Loads the file; raises OSError when llama.cpp refuses it."""
        model_params = ll.llama_model_default_params()
        # Weights stay as they are in the file: the plain kernels, which every machine has.
        model_params.use_extra_bufts = False
        self.model = ll.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise OSError(f"llama.cpp cannot load {path}")
        self.vocab = ll.llama_model_get_vocab(self.model)
        self.n_vocab = ll.llama_vocab_n_tokens(self.vocab)
        self.n_ctx = ll.llama_model_n_ctx_train(self.model)
        params = ll.llama_context_default_params()
        params.n_ctx = params.n_batch = self.n_ctx
        params.n_threads = params.n_threads_batch = _N_THREADS
        self.context = ll.llama_init_from_model(self.model, params)

    def tokenize(self, text: str, *, parse_special: bool = False) -> npt.NDArray[np.int32]:
        """Returns the ids of a text; no token is added."""
        data = text.encode()
        ids = np.empty(len(data) + 8, np.int32)
        buffer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        n = ll.llama_tokenize(self.vocab, data, len(data), buffer, len(ids), False, parse_special)
        return ids[:n]

    def logits(self, tokens: npt.NDArray[np.int32], n_skipped: int = 0) -> npt.NDArray[np.float32]:
        """Returns (n_tokens - n_skipped, n_vocab): what follows each token but the first ones."""
        ll.llama_memory_clear(ll.llama_get_memory(self.context), False)
        n = len(tokens)
        batch = ll.llama_batch_init(n, 0, 1)
        try:
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, i >= n_skipped
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.n_tokens = n
            code = ll.llama_decode(self.context, batch)
        finally:
            ll.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code} for {n} tokens")
        rows = ll.llama_get_logits(self.context)
        return np.ctypeslib.as_array(rows, (n - n_skipped, self.n_vocab)).copy()

    def bits(self, text: str) -> float:
        """Returns -log2 of the probability of the text, from its start."""
        return sum(map(self._window_bits, self._windows(self.tokenize(text))))

    def answer(self, prompt: npt.NDArray[np.int32], text: str) -> tuple[float, bool]:
        """Returns -log2 of the probability of a text after a prompt; whether it began likeliest."""
        first = np.array([ll.llama_vocab_bos(self.vocab)], np.int32)
        targets = self.tokenize(text)
        logits = self.logits(np.concatenate([first, prompt, targets[:-1]]), len(prompt))
        return _nats(logits, targets) / math.log(2), int(logits[0].argmax()) == targets[0]

    def _windows(self, tokens: npt.NDArray[np.int32]) -> Iterator[_Window]:
        size = self.n_ctx - 1
        yield _Window(tokens[:size], 0)
        for end in range(size + size // 2, len(tokens) + size // 2, size // 2):
            window = tokens[end - size : end]
            yield _Window(window, size - size // 2)

    def _window_bits(self, window: _Window) -> float:
        first = np.array([ll.llama_vocab_bos(self.vocab)], np.int32)
        logits = self.logits(np.concatenate([first, window.tokens[:-1]]), window.n_known)
        targets = window.tokens[window.n_known :]
        return _nats(logits, targets) / math.log(2)


def _nats(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> float:
    """Returns the sum of -ln p over the targets, one for each row of logits."""
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
    return float((log_sum - logits[np.arange(len(targets)), targets]).sum())
