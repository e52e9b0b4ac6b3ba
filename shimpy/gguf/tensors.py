"""What a model's tensors take, by where llama.cpp puts them, decided by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

import msgspec

from shimpy.gguf.header import TensorInfo

# llama.cpp's LLM_FFN_EXPS_REGEX (common/common.h): the weights, biases and scales of routed
# experts. Shared experts ("_shexp") and the router ("ffn_gate_inp") don't match.
EXPERT_PATTERN: Final = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
_SPLIT_EXPERT: Final = re.compile(r"blk\.\d+\.ffn_(up|down|gate)\.\d+\.weight")
# "enc.blk.3." and "dec.blk.3." too (T5), but not "v.blk.3.", the vision encoder of a projector.
_BLOCK: Final = re.compile(r"(?:(?:enc|dec)\.)?blk\.(\d{1,9})\.")
# LLM_TENSOR_LAYER_INPUT in src/llama-arch.cpp.
_INPUT: Final = re.compile(
    r"(token_embd|position_embd|token_types|per_layer_token_embd|masked_embd_\w+)\."
)
# An exception there: it runs with the first layer.
_EMBEDDING_NORM: Final = "token_embd_norm."


class TensorSizes(msgspec.Struct):
    """Sums over a tensor table, in bytes; those by layer count what llama.cpp loads."""

    dense: Counter[int] = msgspec.field(default_factory=Counter)
    expert: Counter[int] = msgspec.field(default_factory=Counter)
    n_expert_tensors: Counter[int] = msgspec.field(default_factory=Counter)
    # The largest single tensor of each layer, among its experts and among the rest.
    largest_dense: Counter[int] = msgspec.field(default_factory=Counter)
    largest_expert: Counter[int] = msgspec.field(default_factory=Counter)
    input_bytes: int = 0
    output_bytes: int = 0
    # token_embd.weight, which is part of the input.
    embedding_bytes: int = 0
    has_output: bool = False
    # "cls.*": the head of a model that ranks or classifies.
    has_classifier: bool = False
    has_split_experts: bool = False

    @property
    def tied_bytes(self) -> int:
        """What the copy of the token embedding takes that stands in for a missing output."""
        return 0 if self.has_output else self.embedding_bytes


def sum_tensors(tensors: Iterable[TensorInfo], *, n_loaded: int) -> TensorSizes:
    """Return the sums of a tensor table; blocks from `n_loaded` on are skipped when loading."""
    sizes = TensorSizes()
    for tensor in tensors:
        block = _BLOCK.match(tensor.name)
        if block is None:
            _add_outer(sizes, tensor)
        elif int(block[1]) < n_loaded:
            _add_inner(sizes, tensor, int(block[1]))
    return sizes


def _add_inner(sizes: TensorSizes, tensor: TensorInfo, index: int) -> None:
    if EXPERT_PATTERN.search(tensor.name):
        sizes.expert[index] += tensor.n_bytes
        sizes.n_expert_tensors[index] += 1
        sizes.largest_expert[index] = max(sizes.largest_expert[index], tensor.n_bytes)
        return
    sizes.dense[index] += tensor.n_bytes
    sizes.largest_dense[index] = max(sizes.largest_dense[index], tensor.n_bytes)
    if _SPLIT_EXPERT.fullmatch(tensor.name):
        sizes.has_split_experts = True


def _add_outer(sizes: TensorSizes, tensor: TensorInfo) -> None:
    name = tensor.name
    if name.startswith(_EMBEDDING_NORM):
        sizes.dense[0] += tensor.n_bytes
    elif _INPUT.match(name):
        sizes.input_bytes += tensor.n_bytes
        if name == "token_embd.weight":
            sizes.embedding_bytes = tensor.n_bytes
    else:
        sizes.output_bytes += tensor.n_bytes
        sizes.has_output |= name == "output.weight"
        sizes.has_classifier |= name.startswith("cls.")
