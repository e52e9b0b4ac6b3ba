"""The demo model in llama.cpp, held to what its trainer recorded in reference.json."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shimpy.chat.fim import fim_prompt
from shimpy.demo import MODEL_PATH
from shimpy.engine.backend import Chunk, DecodeStatus
from shimpy.engine.llama import LlamaBackend
from shimpy.protocol.messages import Fim, PromptPart, Text
from tests.engine.llama.running import generate_ids, loaded, logits, prefill, text_of

# Modules that never reached training (docs/demo-model.md).
HELD_OUT = ["bisect.py", "textwrap.py", "shlex.py", "difflib.py", "configparser.py"]
REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference.json").read_text())


@pytest.fixture(scope="module")
def demo() -> Iterator[LlamaBackend]:
    with loaded(MODEL_PATH, check_tensors=True) as backend:
        yield backend


@pytest.mark.parametrize(
    "sample", REFERENCE["tokens"], ids=lambda sample: repr(sample["text"][:20])
)
def test_text_has_the_tokens_that_the_model_was_trained_on(
    demo: LlamaBackend, sample: dict[str, Any]
) -> None:
    """Another cut of the text into words would show the model tokens that it never met."""
    assert demo.tokenize(sample["text"], parse_special=False) == sample["ids"]
    assert text_of(demo, sample["ids"]) == sample["text"]


def test_its_control_tokens_are_known(demo: LlamaBackend) -> None:
    marks: dict[str, int] = REFERENCE["marks"]
    for text, token in marks.items():
        assert demo.tokenize(text, parse_special=True) == [token]
    assert demo.has_fim
    roles = {role: demo.fim_token(role) for role in ("prefix", "suffix", "middle")}
    assert roles == {role: marks[f"<|fim_{role}|>"] for role in roles}
    ends = {text for text, token in marks.items() if demo.is_eog(token)}
    assert ends == {"<|endoftext|>", "<|im_end|>"}
    assert demo.add_bos
    assert demo.bos_id == demo.eos_id == marks["<|endoftext|>"]


def test_llama_cpp_computes_what_was_trained(demo: LlamaBackend) -> None:
    """PyTorch's logits with the file's weights; llama.cpp also rounds activations to 8 bits."""
    prompt = REFERENCE["prompt"]
    differences = []
    n_same = 0
    assert demo.kv_remove(0, 0, -1)
    for position, (top_ids, top_logits) in enumerate(
        zip(REFERENCE["top_ids"], REFERENCE["top_logits"], strict=True)
    ):
        status = demo.decode([Chunk(0, position, prompt[position : position + 1], True)])
        assert status == DecodeStatus.OK
        row = logits(demo)
        differences += list(np.abs(row[top_ids] - top_logits))
        n_same += int(row.argmax()) == top_ids[0]
    assert np.mean(differences) < 0.1
    assert n_same >= 0.95 * len(prompt)


def test_what_comes_after_a_gap_tells_what_is_in_it(demo: LlamaBackend) -> None:
    """In modules that it was not trained on, as this interpreter has them."""
    rng = random.Random(1)
    ahead, around = 0.0, 0.0
    for module in HELD_OUT * 5:
        text = Path(sysconfig.get_path("stdlib"), module).read_text()
        lines = text.splitlines(keepends=True)
        line = rng.choice([n for n in range(8, len(lines)) if len(lines[n].strip()) > 8])
        begin = len("".join(lines[:line])) + rng.randrange(len(lines[line]) - 4)
        end = text.find("\n", begin)
        prefix, suffix = text[begin - 200 : begin], text[end : end + 200]
        first = demo.tokenize(text[begin:end], parse_special=False)[0]
        ahead += surprise(demo, [Text(prefix)], first)
        parts = fim_prompt(
            prefix, suffix, roles={"prefix", "suffix", "middle"}, order="suffix-first"
        )
        around += surprise(demo, parts, first)
    assert around < 0.85 * ahead


def surprise(demo: LlamaBackend, parts: list[PromptPart], token: int) -> float:
    """Return -ln of the probability of a token after a prompt."""
    ids = [demo.bos_id]
    for part in parts:
        match part:
            case Text():
                ids += demo.tokenize(part.text, parse_special=False)
            case Fim():
                ids.append(demo.fim_token(part.role))
    assert demo.kv_remove(0, 0, -1)
    prefill(demo, ids)
    row = logits(demo).astype(np.float64)
    return float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])


@pytest.mark.parametrize("n_cpu_moe", [0, 4, 99])
def test_greedy_text_is_the_same_wherever_the_experts_are(
    demo: LlamaBackend, n_cpu_moe: int
) -> None:
    prompt = "def fibonacci(n):"
    expected = generate_ids(demo, prompt, n=48)
    n_moe_layers = 7
    with loaded(MODEL_PATH, n_cpu_moe=n_cpu_moe) as backend:
        assert backend.n_overridden == 3 * min(max(n_cpu_moe - 1, 0), n_moe_layers)
        assert generate_ids(backend, prompt, n=48) == expected
