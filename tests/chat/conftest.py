from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat.real_grammar import Vocabulary


@pytest.fixture(scope="session")
def vocabulary(llama_model: Path) -> Iterator[Vocabulary]:
    """The vocabulary of a small model, for llama.cpp's grammar engine."""
    made = Vocabulary(llama_model)
    yield made
    made.close()
