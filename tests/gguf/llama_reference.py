"""What llama.cpp itself caches for small models of many architectures.

Run as a program with a folder, it writes a header-only file for each of MODELS there, lets
llama.cpp load it without memory for weights or cache (no_alloc), and prints as JSON what its
log says of the caches. Which tensors an architecture has is not written down: llama.cpp's
errors tell the next one that it misses, and its shape.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.gguf.build import Gguf, Tensor, Value, llama

N_CTX = 8192
N_UBATCH = 256
N_SEQUENCES = 256

_KV = 2
_HYBRID_KV: list[int] = [0, _KV, 0, _KV]
_ALTERNATING = [True, False, True, False]
_MOE: dict[str, Value] = {
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_feed_forward_length": 64,
    "expert_gating_func": 2,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.0,
}
_MLA: dict[str, Value] = {
    "attention__head_count_kv": 1,
    "attention__kv_lora_rank": 32,
    "attention__q_lora_rank": 24,
    "attention__key_length": 48,
    "attention__value_length": 32,
    "attention__key_length_mla": 40,
    "attention__value_length_mla": 24,
    "rope__dimension_count": 16,
    "leading_dense_block_count": 1,
}
_SSM: dict[str, Value] = {
    "ssm__conv_kernel": 4,
    "ssm__inner_size": 128,
    "ssm__state_size": 16,
    "ssm__time_step_rank": 8,
}
_NO_HEADS: dict[str, Value] = {"attention__head_count": 0, "attention__head_count_kv": 0}
_RWKV: dict[str, Value] = {
    "wkv__head_size": 16,
    "attention__decay_lora_rank": 8,
    "attention__iclr_lora_rank": 8,
    "attention__value_residual_mix_lora_rank": 8,
    "attention__gate_lora_rank": 8,
}
_INDEXER: dict[str, Value] = {
    "attention__indexer__head_count": 2,
    "attention__indexer__key_length": 16,
    "attention__indexer__top_k": 64,
    "attention__indexer__block_size": 64,
    "attention__indexer__local_blocks": 1,
}


def _model(arch: str, n_layer: int = 4, **extra: Value) -> dict[str, Value]:
    common: dict[str, Value] = {
        "context_length": 65536,
        "attention__head_count_kv": _KV,
        "attention__layer_norm_rms_epsilon": 1e-5,
        "attention__layer_norm_epsilon": 1e-5,
    }
    return llama(n_layer, arch, **(common | extra))


MODELS: dict[str, dict[str, Value]] = {
    "llama": _model("llama"),
    "llama with wide heads": _model(
        "llama",
        attention__key_length=32,
        attention__value_length=32,
        rope__dimension_count=32,
    ),
    "deci, heads by layer": _model(
        "deci",
        attention__head_count=[4, 4, 4, 4],
        attention__head_count_kv=[2, 4, 1, 2],
        feed_forward_length=[128] * 4,
    ),
    "gemma2": _model("gemma2", attention__sliding_window=1024),
    "gemma3": _model("gemma3", 7, attention__sliding_window=512),
    "gemma4": _model(
        "gemma4",
        6,
        attention__sliding_window=512,
        attention__sliding_window_pattern=[True, False] * 3,
        attention__shared_kv_layers=2,
        attention__key_length=64,
        attention__value_length=64,
        attention__key_length_swa=32,
        attention__value_length_swa=32,
        embedding_length_per_layer_input=0,
    ),
    "cohere2": _model("cohere2", 5, attention__sliding_window=512, logit_scale=0.1),
    "gpt-oss": _model("gpt-oss", attention__sliding_window=128, **_MOE),
    "llama4": _model("llama4", interleave_moe_layer_step=1, **_MOE),
    "olmo2": _model("olmo2", 5, attention__sliding_window=512),
    "olmo2 without window": _model("olmo2"),
    "smallthinker": _model("smallthinker", 5, attention__sliding_window=512, **_MOE),
    "mimo2": _model(
        "mimo2",
        attention__sliding_window=512,
        attention__sliding_window_pattern=_ALTERNATING,
        **_MOE,
    ),
    "deepseek2 with latent attention": _model("deepseek2", **_MOE, **_MLA),
    "minicpm3": _model(
        "minicpm3",
        attention__head_count_kv=4,
        attention__kv_lora_rank=32,
        attention__q_lora_rank=24,
        attention__key_length=48,
        attention__value_length=16,
        rope__dimension_count=16,
    ),
    "minimax-m3": _model("minimax-m3", leading_dense_block_count=1, **_INDEXER, **_MOE),
    "mamba": _model("mamba", **_SSM, **_NO_HEADS),
    "mamba2": _model("mamba2", ssm__group_count=2, **_SSM, **_NO_HEADS),
    "rwkv7": _model("rwkv7", **_RWKV, **_NO_HEADS),
    "jamba": _model("jamba", **_SSM | {"attention__head_count_kv": _HYBRID_KV}),
    "plamo2": _model(
        "plamo2", **_SSM | {"attention__head_count_kv": _HYBRID_KV}, ssm__group_count=0
    ),
    "lfm2": _model("lfm2", shortconv__l_cache=3, attention__head_count_kv=_HYBRID_KV),
    "lfm2 with window": _model(
        "lfm2",
        shortconv__l_cache=3,
        attention__head_count_kv=_HYBRID_KV,
        attention__sliding_window=512,
    ),
    "kimi-linear": _model(
        "kimi-linear",
        **_MOE | _MLA | {"attention__head_count_kv": [0, 1, 0, 1]},
        ssm__conv_kernel=4,
        kda__head_dim=16,
    ),
    "minimax-01": _model("minimax-01", 8, residual_scale=1.0, **_MOE),
}


def _vocabulary() -> dict[str, Value]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    tokens = [chr(byte if byte in plain else next(others)) for byte in range(256)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*tokens, "\u0120t", "<s>", "</s>"],
        "tokenizer.ggml.merges": ["\u0120 t"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
    }


class _Reference:
    """llama.cpp with its log kept."""

    def __init__(self) -> None:
        from llama_cpp import llama_cpp

        self._api: Any = llama_cpp
        self._log: list[str] = []

        @llama_cpp.llama_log_callback
        def on_log(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
            self._log.append(text.decode("utf-8", "replace"))

        self._callback = on_log  # the library keeps only its address
        llama_cpp.llama_log_set(on_log, None)
        llama_cpp.llama_backend_init()

    def caches(self, metadata: dict[str, Value], path: Path) -> dict[str, Any]:
        """Return what llama.cpp's caches take, in MiB, and what it counts."""
        model = self._grow(metadata | _vocabulary(), path)
        found: dict[str, Any] = {
            "kv": self._sizes(model, "KV", n_sequences=1),
            # Many sequences, since a log with two decimals shows nothing of one.
            "state": self._sizes(model, "RS", n_sequences=N_SEQUENCES),
            "n_params": self._api.llama_model_n_params(model),
            "n_layer": self._api.llama_model_n_layer(model),
            "n_ctx_train": self._api.llama_model_n_ctx_train(model),
        }
        self._api.llama_model_free(model)
        return found

    def _sizes(self, model: Any, names: str, *, n_sequences: int) -> list[float]:
        """Return the MiB of what the log calls by these names, over all caches."""
        self._log.clear()
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = N_CTX, n_sequences, True
        params.n_batch = params.n_ubatch = N_UBATCH
        params.flash_attn_type, params.swa_full = 1, False
        self._api.llama_free(self._api.llama_init_from_model(model, params))
        log = "".join(self._log)
        return [
            sum(float(mib) for mib in re.findall(rf"\b{name} \(f\d\d\): +([\d.]+) MiB", log))
            for name in names
        ]

    def _grow(self, metadata: dict[str, Value], path: Path) -> Any:
        shapes: dict[str, tuple[int, ...]] = {"unused.weight": (1,)}
        params = self._api.llama_model_default_params()
        params.no_alloc, params.load_mode = True, self._api.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = False
        while True:
            tensors: list[Tensor] = [(name, shape, "F32") for name, shape in shapes.items()]
            Gguf(metadata=metadata, tensors=tensors).write(path)
            self._log.clear()
            model = self._api.llama_model_load_from_file(str(path).encode(), params)
            if model:
                return model
            shapes.pop("unused.weight", None)
            shapes |= _next_tensor("".join(self._log))


def _next_tensor(log: str) -> dict[str, tuple[int, ...]]:
    missing = re.search(r"tensor '([^']+)' not found", log)
    if missing:
        return {missing[1]: (1,)}
    wrong = re.search(r"tensor '([^']+)' has wrong shape; expected +([\d, ]+), got", log)
    if wrong:
        return {wrong[1]: tuple(int(extent) for extent in wrong[2].split(","))}
    raise SystemExit(log[-2000:])


def main(folder: Path) -> None:
    """Print the caches of all MODELS as JSON; their files stay in the folder."""
    reference = _Reference()
    found = {}
    for number, (name, metadata) in enumerate(MODELS.items()):
        found[name] = reference.caches(metadata, file_of(folder, number))
    sys.stdout.write(json.dumps(found))


def file_of(folder: Path, number: int) -> Path:
    """Return where the file of the number-th of MODELS is."""
    return folder / f"{number}.gguf"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
