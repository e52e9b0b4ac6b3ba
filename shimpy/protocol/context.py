"""How many cells of the KV cache a context gets: workers make them, plans count them. Pure."""

from __future__ import annotations

from typing import Final

# llama.cpp rounds a context up to so many (llama_context::llama_context, GGML_PAD).
CELL_STEP: Final = 256
# Without flash attention values lie transposed, each row as long as the cache has cells. Rows
# whose lengths have a large power of two in common fall into the same few lines of a CPU's
# caches: prompts of 256 tokens take 3 to 7 % longer with 4096 cells than with 4352, and 6 to 11 %
# longer with 8192 than with 8448 (docs/performance.md).
_ALIASED: Final = 1024


def pad_context(n_ctx: int) -> int:
    """Return a context's length as llama.cpp rounds it."""
    return -(-n_ctx // CELL_STEP) * CELL_STEP


def n_cells(n_ctx: int, *, flash_attn: bool, n_ctx_original: int = 0) -> int:
    """Return the cells for a context of `n_ctx` tokens.

    `n_ctx_original`: past this length the model turns positions otherwise (LongRoPE,
    llama_model::get_rope_factors goes by the cells); rounding does not lead there.
    """
    n = pad_context(n_ctx)
    if flash_attn or n % _ALIASED or n <= n_ctx_original < n + CELL_STEP:
        return n
    return n + CELL_STEP
