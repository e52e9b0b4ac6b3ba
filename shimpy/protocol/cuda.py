"""How a worker's CUDA context is made: what is learnt of a card depends on it."""

from __future__ import annotations

from typing import Final

# The stack of each thread on a card (engine.llama.stacks).
STACK_BYTES: Final = 256
