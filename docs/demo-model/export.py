"""Writes the trained model as a GGUF file of llama.cpp's architecture `deepseek`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from model import Block, DeepSeekMoE, FeedForward, MixtureOfExperts
from samples import CHAT_TEMPLATE
from tokenizers import Tokenizer
from vocabulary import END_OF_TEXT, IM_END, PRE_TOKENIZER, SPECIAL_TOKENS

WeightType = Literal["q8_0", "f32"]
# Sampling that suits a model of this size; llama.cpp's tools read it from the file.
TEMPERATURE, TOP_K, TOP_P, REPEAT_PENALTY = 0.2, 40, 0.95, 1.05

_ARCHITECTURE = "deepseek"
_TYPES = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}


def export(path: Path, model: DeepSeekMoE, tokenizer: Tokenizer, weight_type: WeightType) -> None:
    """Writes the file: matrices in weight_type, norms and routers in F32."""
    ggml_type, file_type = _TYPES[weight_type]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, _ARCHITECTURE)
    _add_description(writer, model, file_type)
    _add_sizes(writer, model)
    _add_tokenizer(writer, tokenizer)
    for name, weights in tensors(model):
        is_kept = weights.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        kind = GGMLQuantizationType.F32 if is_kept else ggml_type
        writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: DeepSeekMoE) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yields each tensor under llama.cpp's name (src/models/deepseek.cpp), rows last."""
    yield "token_embd.weight", _array(model.embedding.weight)
    for index, block in enumerate(model.blocks):
        for name, weights in _block_tensors(block):
            yield f"blk.{index}.{name}.weight", _array(weights)
    yield "output_norm.weight", _array(model.output_norm.weight)


def _block_tensors(block: Block) -> Iterator[tuple[str, npt.ArrayLike]]:
    yield "attn_norm", block.attn_norm.weight
    yield "attn_q", block.attn.q.weight
    yield "attn_k", block.attn.k.weight
    yield "attn_v", block.attn.v.weight
    yield "attn_output", block.attn.output.weight
    yield "ffn_norm", block.ffn_norm.weight
    if isinstance(block.ffn, MixtureOfExperts):
        yield "ffn_gate_inp", block.ffn.router.weight
        yield "ffn_gate_exps", block.ffn.gate
        yield "ffn_up_exps", block.ffn.up
        yield "ffn_down_exps", block.ffn.down
        yield from _feed_forward_tensors(block.ffn.shared, "_shexp")
    else:
        yield from _feed_forward_tensors(block.ffn, "")


def _feed_forward_tensors(ffn: FeedForward, suffix: str) -> Iterator[tuple[str, npt.ArrayLike]]:
    yield f"ffn_gate{suffix}", ffn.gate.weight
    yield f"ffn_up{suffix}", ffn.up.weight
    yield f"ffn_down{suffix}", ffn.down.weight


def _array(weights: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(weights.detach().float().numpy())


def _add_description(writer: GGUFWriter, model: DeepSeekMoE, file_type: LlamaFileType) -> None:
    n_params = sum(p.numel() for p in model.parameters())
    writer.add_type("model")
    writer.add_name("shimpy demo")
    writer.add_description(
        "A small DeepSeek-MoE that completes Python, trained by the shimpy project on the "
        "sources of the Python standard library."
    )
    writer.add_size_label(f"{model.config.n_expert}x{n_params / 1e6:.1f}M")
    # The model and the text that it was trained on.
    writer.add_license("PSF-2.0")
    writer.add_license_name("Python Software Foundation License Version 2")
    writer.add_license_link("https://docs.python.org/3/license.html")
    writer.add_dataset_count(1)
    writer.add_dataset_name(0, "Python standard library, sources")
    writer.add_dataset_organization(0, "Python Software Foundation")
    writer.add_dataset_url(0, "https://github.com/python/cpython")
    writer.add_tags(["text-generation", "code", "python", "fill-in-the-middle"])
    writer.add_languages(["en"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    # What the tokens for fill-in-the-middle do not tell: in which order they are to come.
    writer.add_string("shimpy.fim_order", "suffix-first")
    writer.add_sampling_temp(TEMPERATURE)
    writer.add_sampling_top_k(TOP_K)
    writer.add_sampling_top_p(TOP_P)
    writer.add_sampling_penalty_repeat(REPEAT_PENALTY)


def _add_sizes(writer: GGUFWriter, model: DeepSeekMoE) -> None:
    config = model.config
    writer.add_vocab_size(config.n_vocab)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_rope_dimension_count(config.n_embd_head)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_leading_dense_block_count(config.n_layer_dense)
    writer.add_expert_count(config.n_expert)
    writer.add_expert_used_count(config.n_expert_used)
    writer.add_expert_shared_count(config.n_expert_shared)
    writer.add_expert_feed_forward_length(config.n_ff_exp)
    writer.add_expert_weights_scale(1.0)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list([text for text, _ in pieces])
    writer.add_token_types(
        [TokenType.CONTROL if text in SPECIAL_TOKENS else TokenType.NORMAL for text, _ in pieces]
    )
    writer.add_token_merges([" ".join(merge) for merge in merges])
    end = tokenizer.token_to_id(END_OF_TEXT)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(tokenizer.token_to_id(IM_END))
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
