"""Cells of a context: whole steps, and no row that a CPU's caches have few lines for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimpy.protocol.context import CELL_STEP, n_cells


@pytest.mark.parametrize(("n_ctx", "cells"), [(1, 256), (256, 256), (1000, 1024), (4096, 4096)])
def test_a_context_is_padded_to_whole_steps(n_ctx: int, cells: int) -> None:
    assert n_cells(n_ctx, flash_attn=True) == cells


@pytest.mark.parametrize(
    ("n_ctx", "cells"), [(1, 256), (512, 512), (1000, 1280), (4096, 4352), (6400, 6400)]
)
def test_without_flash_attention_powers_of_two_are_avoided(n_ctx: int, cells: int) -> None:
    assert n_cells(n_ctx, flash_attn=False) == cells


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.booleans())
def test_no_length_is_turned_otherwise_for_being_rounded(
    n_ctx: int, original: int, flash_attn: bool
) -> None:
    """But by llama.cpp itself, which rounds a length that is between two steps."""
    cells = n_cells(n_ctx, flash_attn=flash_attn, n_ctx_original=original)
    rounded = -(-n_ctx // CELL_STEP) * CELL_STEP
    assert rounded <= cells <= rounded + CELL_STEP
    assert (cells > original) == (rounded > original)
