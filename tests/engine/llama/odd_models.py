"""Tiny models whose states are of another kind: sliding windows, recurrent, compressed (MLA)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from tests.synthetic.gguf_file import GgufFile
from tests.synthetic.vocabulary import bpe_vocabulary
from tests.synthetic.weights import Weights

N_WINDOW = 32
_N_EMBD, _N_VOCAB, _N_LAYER = 64, 512, 4
_F32 = GgmlType.F32


def write_window(path: Path) -> Path:
    """Write a Gemma 2: every other layer sees the last N_WINDOW tokens alone."""
    keys = {
        "context_length": 4096,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": N_WINDOW,
    }
    layer = {
        "attn_norm.weight": (64,),
        "attn_q.weight": (64, 64),
        "attn_k.weight": (32, 64),
        "attn_v.weight": (32, 64),
        "attn_output.weight": (64, 64),
        "post_attention_norm.weight": (64,),
        "ffn_norm.weight": (64,),
        "ffn_gate.weight": (96, 64),
        "ffn_up.weight": (96, 64),
        "ffn_down.weight": (64, 96),
        "post_ffw_norm.weight": (64,),
    }
    return _write(path, "gemma2", keys, layer)


def write_recurrent(path: Path) -> Path:
    """Write a Mamba: a state of one size, however long the text."""
    keys = {
        "context_length": 4096,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
    }
    layer = {
        "attn_norm.weight": (64,),
        "ssm_in.weight": (256, 64),
        "ssm_conv1d.weight": (128, 4),
        "ssm_conv1d.bias": (128,),
        "ssm_x.weight": (36, 128),
        "ssm_dt.weight": (128, 4),
        "ssm_dt.bias": (128,),
        "ssm_a": (128, 16),
        "ssm_d": (128,),
        "ssm_out.weight": (64, 128),
    }
    return _write(path, "mamba", keys, layer)


def write_compressed(path: Path) -> Path:
    """Write a DeepSeek 2 of dense layers: its cache holds latent vectors, and no values."""
    keys = {
        "context_length": 4096,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 24,
        "attention.kv_lora_rank": 32,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "attention.key_length_mla": 32,
        "attention.value_length_mla": 16,
        "rope.dimension_count": 16,
        "leading_dense_block_count": _N_LAYER,
        "expert_feed_forward_length": 96,
        "expert_shared_count": 0,
    }
    layer = {
        "attn_norm.weight": (64,),
        "attn_q_a.weight": (24, 64),
        "attn_q_a_norm.weight": (24,),
        "attn_q_b.weight": (128, 24),
        "attn_kv_a_mqa.weight": (48, 64),
        "attn_kv_a_norm.weight": (32,),
        "attn_k_b.weight": (4, 32, 16),
        "attn_v_b.weight": (4, 16, 32),
        "attn_output.weight": (64, 64),
        "ffn_norm.weight": (64,),
        "ffn_gate.weight": (96, 64),
        "ffn_up.weight": (96, 64),
        "ffn_down.weight": (64, 96),
    }
    return _write(path, "deepseek2", keys, layer)


def _write(
    path: Path, arch: str, keys: Mapping[str, int], layer: Mapping[str, tuple[int, ...]]
) -> Path:
    file, weights = GgufFile(path, arch), Weights(1)
    writer = file.writer
    writer.add_block_count(_N_LAYER)
    writer.add_embedding_length(_N_EMBD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(_N_VOCAB)
    for key, value in keys.items():
        writer.add_uint32(f"{arch}.{key}", value)
    bpe_vocabulary(_N_VOCAB).add_to(writer, add_bos=True, chat_template=None)
    table = (_N_VOCAB, _N_EMBD)
    file.add("token_embd.weight", _F32, table, partial(weights.random, _F32, table, 1.0))
    _add_constant(file, "output_norm.weight", (_N_EMBD,), 1.0)
    for index in range(_N_LAYER):
        for name, dims in layer.items():
            full = f"blk.{index}.{name}"
            if name == "ssm_a":
                # It decays.
                _add_constant(file, full, dims, -1.0)
            elif len(dims) == 1:
                _add_constant(file, full, dims, 1.0)
            else:
                std = 2.0 / float(np.sqrt(dims[-1]))
                file.add(full, _F32, dims, partial(weights.random, _F32, dims, std))
    return file.write()


def _add_constant(file: GgufFile, name: str, dims: tuple[int, ...], value: float) -> None:
    data = np.full(dims, value, np.float32).view(np.uint8)
    file.add(name, _F32, dims, lambda: iter([data]))
