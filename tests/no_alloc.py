"""What llama.cpp itself would take for a model: loaded without allocating, in a process of its own.

    python -m tests.no_alloc MODEL.gguf '[{"n_ctx": 4096, ...}, ...]'

prints, per setting, the bytes of weights, KV cache and computation in host memory, as JSON.
The model may be header-only (tests/shapes.py).
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

from shimpy.engine.llama.library import LL
from shimpy.engine.llama.memory import read_memory

_KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
_LOAD_MODE_NONE = 0


def main(path: str, settings: str) -> None:
    # A C function as callback: nothing of the log is kept.
    quiet = ctypes.cast(ctypes.CDLL(None).abs, LL.llama_log_callback)
    LL.llama_log_set(quiet, None)
    params = LL.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = _LOAD_MODE_NONE
    params.use_extra_bufts = False
    params.n_gpu_layers = 0
    model = LL.llama_model_load_from_file(path.encode(), params)
    assert model, path
    taken = [_take(model, **setting) for setting in json.loads(settings)]
    sys.stdout.write(json.dumps(taken) + "\n")


def _take(model: Any, *, n_ctx: int, n_slots: int, n_ubatch: int, kv_type: str) -> list[int]:
    params = LL.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_ubatch = n_ctx, n_slots, n_ubatch
    params.n_batch = max(2048, n_ubatch)
    params.n_outputs_max = n_slots
    params.kv_unified = params.swa_full = True
    params.type_k = params.type_v = _KV_TYPES[kv_type]
    params.flash_attn_type = 1
    context = LL.llama_init_from_model(model, params)
    assert context
    held = read_memory(context)
    LL.llama_free(context)
    return [
        sum(use.model_bytes for use in held),
        sum(use.context_bytes for use in held),
        sum(use.compute_bytes for use in held),
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
