"""The model in the box: a small mixture of experts that completes Python.

demo.gguf is data, made by docs/demo-model and described in docs/demo-model.md. It is read like
any other model; nothing here knows more of it than where it lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_PATH: Final = Path(__file__).parent / "demo.gguf"
