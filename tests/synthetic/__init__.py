"""Small GGUF models that the real llama.cpp loads, written in milliseconds.

Random weights from a fixed seed (`write_llama`, `write_mixtral`, `write_deepseek`,
`write_qwen3moe`, `write_bert`, `write_nomic_bert`) for tests that compare runs, and a chain
(`write_chain`) for tests that must know the text beforehand. The same arguments give the
same bytes. `python -m tests.synthetic --help` writes them, and the large ones for benchmarks,
from the command line.
"""

from tests.synthetic.chain import CHAIN_TEXT, chain_pieces, write_chain
from tests.synthetic.decoders import (
    PRESETS,
    Decoder,
    write_decoder,
    write_deepseek,
    write_llama,
    write_mixtral,
    write_preset,
    write_qwen3moe,
)
from tests.synthetic.encoders import Encoder, write_bert, write_nomic_bert, write_reranker
from tests.synthetic.vocabulary import CHATML, SPECIALS

__all__ = [
    "CHAIN_TEXT",
    "CHATML",
    "PRESETS",
    "SPECIALS",
    "Decoder",
    "Encoder",
    "chain_pieces",
    "write_bert",
    "write_chain",
    "write_decoder",
    "write_deepseek",
    "write_llama",
    "write_mixtral",
    "write_nomic_bert",
    "write_preset",
    "write_qwen3moe",
    "write_reranker",
]
