"""llama_token_data_array over numpy: candidates for llama.cpp's samplers to work on."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.library import LL, Pointer, bind

Ids = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Row = npt.NDArray[np.float32]

# llama.h, struct llama_token_data.
DTYPE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_N_FIRST = 256

_apply = bind("llama_sampler_apply", None, ctypes.c_void_p, ctypes.c_void_p)


class Candidates:
    """Room for tokens with their logits, which samplers change in place; filled again and again."""

    def __init__(self) -> None:
        self._reserve(_N_FIRST)

    def fill(self, ids: Ids, logits: Row | float) -> None:
        """Take tokens, one at least, with their logits, or with one for all."""
        n = len(ids)
        if n > len(self._id):
            self._reserve(n)
        self._id[:n] = ids
        self._logit[:n] = logits
        array = self._array
        # A sampler may have moved it past those that it left out (xtc).
        array.data = self._start
        array.size = n
        array.selected = -1
        array.sorted = False

    def apply(self, sampler: Pointer) -> None:
        """Let a sampler of llama.cpp work on them."""
        _apply(sampler, self._at)

    @property
    def logits(self) -> Row:
        """The logits, in the order given unless a sampler sorted them; a view."""
        logits: Row = self._logit[: self._array.size]
        return logits

    @property
    def selected(self) -> int:
        """The token that the last sampler of a chain chose."""
        array = self._array
        return int(array.data[array.selected].id)

    def _reserve(self, n: int) -> None:
        data = np.zeros(n, DTYPE)
        self._id: npt.NDArray[Any] = data["id"]
        self._logit: npt.NDArray[Any] = data["logit"]
        self._start = ctypes.cast(data.ctypes.data, LL.llama_token_data_p)
        self._array = LL.llama_token_data_array(data=self._start)
        self._at = ctypes.addressof(self._array)
