"""One app for all tests of OpenAI's dialect, over the real llama.cpp."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from tests.chat.templates import QWEN3
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "Berlin"}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Say what the weather is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "Berlin"]}},
            "required": ["zone"],
        },
    },
}


@pytest_asyncio.fixture(loop_scope="package", scope="package")
async def app(
    tmp_path_factory: pytest.TempPathFactory,
    chain_model: Path,
    bert_model: Path,
    llama_model: Path,
) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("openai")
    shutil.copy(chain_model, folder / "chain.gguf")
    shutil.copy(bert_model, folder / "bert.gguf")
    shutil.copy(llama_model, folder / "llama.gguf")
    write_chain(folder / "base.gguf", chat_template=None)
    thought = "<think>\nHmm, rivers first.\n</think>\n\nThe Rhine flows there."
    write_chain(folder / "thinker.gguf", thought, chat_template=QWEN3)
    write_chain(folder / "caller.gguf", f"I look it up.\n{CALL}\n{OTHER}", chat_template=QWEN3)
    async with running_app(folder, tmp_path_factory.mktemp("state")) as running:
        yield running


def sse_events(text: str) -> list[Any]:
    """The JSON of each event, and "[DONE]" as it is."""
    events: list[Any] = []
    for block in text.split("\n\n"):
        data = [line.removeprefix("data: ") for line in block.splitlines() if line[:1] == "d"]
        if data:
            joined = "\n".join(data)
            events.append(joined if joined == "[DONE]" else msgspec.json.decode(joined))
    return events
