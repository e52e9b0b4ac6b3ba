"""The worker as the daemon sees it: a real process, a real llama.cpp, small real models."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimpy.protocol.messages import (
    PROTOCOL_VERSION,
    BuildInfo,
    Cancel,
    Embed,
    Embedded,
    Hello,
    Load,
    LoadFailed,
    Prefilled,
    Ready,
    Sampling,
    SetThreads,
    Shutdown,
    Text,
    Tokenize,
    Tokenized,
)
from tests.engine.worker import GREEDY, TIMEOUT_S, Worker
from tests.synthetic import CHAIN_TEXT

ARCHITECTURES = ["llama", "mixtral", "deepseek", "qwen3moe"]
# Different lengths, some with a prefix in common.
PROMPTS = [
    "Hello wörld 日本 🙂",
    "The fox",
    "The fox said that it is the end of the story, " * 6,
    "The fox said that it is the end of the story, " * 6 + "and left.",
    "x",
    "Once upon a time there was a question. " * 12,
    "\n\n",
    "def main():\n    return 0\n" * 9,
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_eight_streams_at_once_equal_the_same_eight_alone(
    arch: str, request: pytest.FixtureRequest
) -> None:
    """Without flash attention: on a CPU that computes batches of 64 tokens and more by another
    kernel, whose logits differ by about 0.01 from those of small batches.
    """
    model = request.getfixturevalue(f"{arch}_model")
    with Worker.serving(model, flash_attn="off") as worker:
        alone = [
            worker.generate(100 + i, prompt, n_predict=40, no_cache=True, return_tokens=True)
            for i, prompt in enumerate(PROMPTS)
        ]
        for i, prompt in enumerate(PROMPTS):
            worker.submit(i, prompt, n_predict=40, return_tokens=True)
        together = worker.finish(*range(len(PROMPTS)))
    assert [told.done.tokens for told in together] == [told.done.tokens for told in alone]
    assert [told.text for told in together] == [told.text for told in alone]
    assert len({told.text for told in alone}) == len(PROMPTS)
