"""Records what the trainer's own code makes of the exported file, for the package's tests.

The tests hold llama.cpp to it: the same tokens from the `tokenizers` package, and nearly the
same logits from PyTorch with the file's own (quantized) weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from export import tensors
from gguf import GGUFReader
from gguf.quants import dequantize
from model import DeepSeekMoE
from tokenizers import Tokenizer
from vocabulary import END_OF_TEXT, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, IM_END, IM_START

# Plain text: what looks like a control token here must not become one.
TEXTS = (
    "def fibonacci(n):",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "class A(B):\n\n\n    x: int = 0x1F  # 31\r\n\treturn self.x**2 != 1_000.5e-3\n",
    "   leading and trailing   \n\n  \n",
    "it's we'll I'M you'Re don'T 's",
    "naïve café ﬁancée Straße 日本語のテキスト한국어 тест",
    "emoji 🙂👩‍👩‍👧 and combining e\u0301 a\u0300\u0323 zero\u200bwidth nbsp\u00a0end",
    "٣٤٥ ²³ Ⅷ ½ 12345 6.7.8",
    "a\u2028b\u2029c\u0085d\x0be\x0cf",
    '"""Docstring."""\n>>> print("{}".format(1))\n1\n',
    "\t\t\tif x:\n\t\t\t\tpass\n",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~ …—“”",
    "x" * 70 + " " * 40 + "=" * 30,
)
MARKS = (END_OF_TEXT, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE, IM_START, IM_END)
_PROMPT = (
    "import heapq\n\n\ndef nsmallest(items, n):\n"
    '    """Return the n smallest items, in order."""\n    return sorted(items)[:n]\n'
)
_N_TOP = 5


def record(path: Path, model_path: Path, model: DeepSeekMoE, tokenizer: Tokenizer) -> None:
    """Writes texts with their tokens, and the highest logits at each position of a prompt."""
    load_weights(model, model_path)
    prompt = [tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(_PROMPT).ids]
    with torch.no_grad():
        top = model(torch.tensor([prompt]))[0][0].topk(_N_TOP)
    record = {
        "tokens": [{"text": text, "ids": tokenizer.encode(text).ids} for text in TEXTS],
        "marks": {mark: tokenizer.token_to_id(mark) for mark in MARKS},
        "prompt": prompt,
        "top_ids": top.indices.tolist(),
        "top_logits": [[round(logit, 4) for logit in row] for row in top.values.tolist()],
    }
    path.write_text(json.dumps(record, indent=None, ensure_ascii=True) + "\n")


def load_weights(model: DeepSeekMoE, path: Path) -> None:
    """Gives the model the weights of an exported file, as they are after quantization."""
    in_file = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, weights in tensors(model):
        tensor = in_file[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        # `weights` shares its memory with the parameter.
        weights[...] = values.reshape(weights.shape)
