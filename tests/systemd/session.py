"""A daemon with one answer from real llama.cpp, to be traced."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx

from tests.daemon import running_daemon
from tests.synthetic import CHAIN_TEXT, write_chain


def main(folder: Path) -> None:
    """Start a daemon, ask it once, and stop it."""
    models = folder / "models"
    models.mkdir()
    write_chain(models / "chain.gguf")
    body = {"model": "chain", "prompt": "hi", "stream": False}
    with running_daemon(folder / "home", models, threads=2) as daemon:
        answer = httpx.post(f"{daemon.url}/api/generate", json=body, timeout=40, trust_env=False)
        assert answer.json()["response"] == CHAIN_TEXT


if __name__ == "__main__":
    main(Path(sys.argv[1]))
