"""llama_token_data_array over numpy: candidates for llama.cpp's samplers to work on."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from shimpy.engine.llama.library import LL, Pointer

# llama.h, struct llama_token_data.
_DTYPE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Candidates:
    """Tokens with their logits, changed in place by the samplers that are applied."""

    def __init__(self, ids: npt.NDArray[Any], logits: npt.NDArray[np.float32]) -> None:
        """Take as many logits as ids; at least one."""
        self._data = np.zeros(len(ids), _DTYPE)
        self._data["id"] = ids
        self._data["logit"] = logits
        self._array = LL.llama_token_data_array(
            data=ctypes.cast(self._data.ctypes.data, LL.llama_token_data_p),
            size=len(ids),
            selected=-1,
            sorted=False,
        )

    def apply(self, sampler: Pointer) -> None:
        """Let a sampler of llama.cpp work on them."""
        LL.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits, in the order given unless a sampler sorted them; a view, writable."""
        logits: npt.NDArray[np.float32] = self._data["logit"]
        return logits

    @property
    def selected(self) -> int:
        """The token that the last sampler of a chain chose."""
        token: int = self._array.data[self._array.selected].id
        return token
