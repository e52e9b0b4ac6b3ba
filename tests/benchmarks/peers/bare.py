"""The limit: llama.cpp's low-level API in the plainest loop, without a server round it.

Takes jobs as lines of JSON and answers each with one: prompts are prefilled one after the
other in batches as large as may be, then all sequences decode together, greedily. Nothing is
streamed, stopped or looked up. `python -m tests.benchmarks.peers.bare` is started by the
benchmark.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.library import LL

Array = npt.NDArray[Any]

N_BATCH = 512
_WORDS = [
    "time",
    "river",
    "stone",
    "letter",
    "garden",
    "window",
    "night",
    "market",
    "paper",
    "winter",
    "story",
    "bridge",
]


class Bare:
    """A model, a context and one batch over numpy."""

    def __init__(
        self, path: str, n_ctx: int, n_slots: int, n_threads: int, *, kv_unified: bool
    ) -> None:
        """`n_ctx`: tokens of all sequences if `kv_unified`, else of each."""
        LL.llama_backend_init()
        model_params = LL.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = False
        self._model = LL.llama_model_load_from_file(path.encode(), model_params)
        params = LL.llama_context_default_params()
        params.n_ctx = n_ctx if kv_unified else n_ctx * n_slots
        params.n_seq_max = n_slots
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = kv_unified
        # As the daemon places it on a CPU.
        params.flash_attn_type = 0
        params.n_outputs_max = n_slots
        self._context = LL.llama_init_from_model(self._model, params)
        self._memory = LL.llama_get_memory(self._context)
        self._vocab = LL.llama_model_get_vocab(self._model)
        self._n_vocab = LL.llama_vocab_n_tokens(self._vocab)
        self._token, self._pos, self._seq = (np.zeros(N_BATCH, np.int32) for _ in range(3))
        self._wanted = np.zeros(N_BATCH, np.int8)
        self._ones = np.ones(N_BATCH, np.int32)
        self._at = self._seq.ctypes.data + 4 * np.arange(N_BATCH, dtype=np.uint64)
        integers = ctypes.POINTER(ctypes.c_int32)
        self._batch = LL.llama_batch(
            n_tokens=0,
            token=_as(ctypes.c_int32, self._token),
            pos=_as(ctypes.c_int32, self._pos),
            n_seq_id=_as(ctypes.c_int32, self._ones),
            seq_id=_as(integers, self._at),
            logits=_as(ctypes.c_int8, self._wanted),
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with the start token where the model wants one."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = LL.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, True)
        return list(ids[:n])

    def make_prompts(self, n_prompts: int, n_tokens: int, seed: int) -> list[str]:
        """Return texts of `n_tokens` tokens or a few more that share no beginning."""
        draw = random.Random(seed)
        prompts = []
        for _ in range(n_prompts):
            text = f"{draw.randrange(10**6)}"
            n = len(self.tokenize(text))
            while n < n_tokens:
                few = max(1, (n_tokens - n) // 4)
                text += "".join(f" {draw.choice(_WORDS)}" for _ in range(few))
                n = len(self.tokenize(text))
            prompts.append(text)
        return prompts

    def generate(self, prompts: list[str], n_predict: int) -> dict[str, Any]:
        """Answer all prompts; return the seconds to each token of each."""
        LL.llama_memory_clear(self._memory, True)
        started = time.perf_counter()
        n_slots = len(prompts)
        ids = [self.tokenize(prompt) for prompt in prompts]
        firsts = np.zeros(n_slots)
        tokens = np.zeros(n_slots, np.int32)
        self._prefill(ids, tokens, firsts)
        positions = np.array([len(one) for one in ids], np.int32)
        self._seq[:n_slots] = np.arange(n_slots)
        self._wanted[:n_slots] = 1
        later: list[float] = []
        for step in range(n_predict - 1):
            self._token[:n_slots] = tokens
            self._pos[:n_slots] = positions + step
            tokens = self._decode(n_slots, n_slots)
            later.append(time.perf_counter() - started)
        return {
            "arrivals_s": [[first, *later] for first in (firsts - started).tolist()],
            "n_prompt": [len(one) for one in ids],
        }

    def _prefill(self, ids: list[list[int]], tokens: Array, firsts: Array) -> None:
        at = 0
        ending: list[int] = []
        for slot, prompt in enumerate(ids):
            start = 0
            while start < len(prompt):
                n = min(N_BATCH - at, len(prompt) - start)
                run = slice(at, at + n)
                self._token[run] = prompt[start : start + n]
                self._pos[run] = np.arange(start, start + n)
                self._seq[run] = slot
                self._wanted[run] = 0
                at, start = at + n, start + n
                if start == len(prompt):
                    self._wanted[at - 1] = 1
                    ending.append(slot)
                is_last = start == len(prompt) and slot == len(ids) - 1
                if at == N_BATCH or is_last:
                    best = self._decode(at, len(ending))
                    tokens[ending] = best
                    firsts[ending] = time.perf_counter()
                    at, ending = 0, []

    def _decode(self, n_tokens: int, n_outputs: int) -> Array:
        self._batch.n_tokens = n_tokens
        status = LL.llama_decode(self._context, self._batch)
        assert status == 0, f"llama_decode: {status}"
        if not n_outputs:
            LL.llama_synchronize(self._context)
            return np.zeros(0, np.int32)
        address = ctypes.cast(LL.llama_get_logits(self._context), ctypes.c_void_p).value
        assert address is not None
        rows = (ctypes.c_float * (n_outputs * self._n_vocab)).from_address(address)
        best: Array = np.ctypeslib.as_array(rows).reshape(n_outputs, -1).argmax(axis=1)
        return best


def _as(kind: Any, array: Array) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def main() -> None:
    """Answer jobs until there are no more."""
    given = json.loads(sys.argv[1])
    bare = Bare(
        given["path"],
        given["n_ctx"],
        given["n_slots"],
        given["n_threads"],
        kv_unified=given["kv_unified"],
    )
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        answer = getattr(bare, job.pop("do"))(**job)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
