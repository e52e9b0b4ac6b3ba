"""What restoring a saved prefix saves: `python -m tests.benchmarks.prefix MODEL.gguf`.

Loads a model in the daemon, asks with a long prompt, unloads it, and asks again; in turns with
prompts that were never seen, on the same load. Prints the medians of the time that the first
token took after the model was loaded, and of their ratios in each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.daemon import Daemon, running_daemon

_TIMEOUT_S = 600.0


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.prefix", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file that generates")
    parser.add_argument("--tokens", type=int, default=2000, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        (models / "subject.gguf").symlink_to(arguments.model.absolute())
        with (
            running_daemon(Path(folder) / "home", models, threads=arguments.threads) as daemon,
            httpx.Client(base_url=daemon.url, timeout=_TIMEOUT_S) as client,
        ):
            measure(client, daemon, arguments.tokens, arguments.rounds)


def measure(client: httpx.Client, daemon: Daemon, n_tokens: int, n_rounds: int) -> None:
    """Ask a prompt anew, and again after an unload, in each round."""
    computed, restored = [], []
    per_word = count(client, words(0, 100)) / 100
    n_words = round(n_tokens / per_word)
    for index in range(1, n_rounds + 1):
        # No two rounds share a beginning.
        prompt = words(index, n_words)
        unload(client)
        computed.append(first_token_s(client, prompt))
        unload(client)
        restored.append(first_token_s(client, prompt))
    print(f"a prompt of {count(client, prompt)} tokens, {n_rounds} rounds, without the load:")
    print(f"computed {statistics.median(computed):.3f} s")
    print(f"restored {statistics.median(restored):.3f} s")
    ratios = [again / first for first, again in zip(computed, restored, strict=True)]
    print(f"restored/computed {statistics.median(ratios):.4f}")
    news = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    for kind in ("prefix_saved", "prefix_restored"):
        told = [one for one in news if one["event"] == kind and one["n_tokens"] >= n_tokens // 2]
        assert len(told) >= n_rounds, f"{kind}: {len(told)} times"
        took_s = statistics.median(one["took_s"] for one in told)
        print(f"{kind}: {told[0]['n_bytes']} bytes in {took_s:.3f} s")


def words(seed: int, n: int) -> str:
    """Return a text of `n` words."""
    return " ".join(f"w{(i * 7919 + seed * 104729) % 997}" for i in range(n))


def count(client: httpx.Client, prompt: str) -> int:
    """Return the tokens of a text."""
    return int(ask(client, prompt)["prompt_eval_count"])


def first_token_s(client: httpx.Client, prompt: str) -> float:
    """Return the time to the first token, but for the load of the model."""
    answer = ask(client, prompt)
    return float(answer["total_duration"] - answer["load_duration"]) / 1e9


def ask(client: httpx.Client, prompt: str) -> dict[str, Any]:
    """Generate one token."""
    body = {"model": "subject", "prompt": prompt, "raw": True, "stream": False}
    body["options"] = {"num_predict": 1, "temperature": 0}
    answer: dict[str, Any] = client.post("/api/generate", json=body).raise_for_status().json()
    return answer


def unload(client: httpx.Client) -> None:
    """Unload the model and wait until its worker has gone."""
    client.post("/api/generate", json={"model": "subject", "keep_alive": 0}).raise_for_status()
    while client.get("/api/ps").json()["models"]:
        pass


if __name__ == "__main__":
    main()
