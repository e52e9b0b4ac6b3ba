"""What is measured of each contender, one function a kind of work; all times are of the client.

A scenario is run once for each contender in each round, with the prompts of that round.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import client
from tests.benchmarks.peers.contenders import BareLoop, Contender, Server, Setup, cpu_s, echo
from tests.benchmarks.peers.report import US
from tests.benchmarks.peers.targets import (
    ADDED_MS,
    NOISE,
    Target,
    at_least,
    at_most,
    of_streams,
)

Metrics = dict[str, float]
# Makes prompts: how many, of how many tokens, from which seed.
MakePrompts = Callable[[int, int, int], list[str]]

ALL = ("bare", "shimpy", "xllamacpp", "llama_cpp.server")
SERVERS = ALL[1:]
_SHORT_TEXTS = 64
# Tokens of prompts that a prefill is measured with, at least.
_PREFILLED = 512
_APART_S = 0.05
_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "summary": {"type": "string", "maxLength": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 6},
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["title", "summary", "tags", "score"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One kind of work on one model."""

    name: str
    model: str
    contenders: tuple[str, ...]
    # Numbers whose ratios are shown first.
    headline: tuple[str, ...]
    run: Callable[[Contender, MakePrompts, int], Coroutine[Any, Any, Metrics]]
    # Part of `--quick`.
    is_quick: bool = False
    targets: tuple[Target, ...] = ()


def streams(
    model: str, n_prompt: int, n_streams: int, *, n_predict: int = 64, is_quick: bool = False
) -> Scenario:
    """So many prompts at once, each answered with `n_predict` tokens.

    And before it others that are answered with one token: prefill_per_s is theirs, as nothing
    else is computed beside them. Where all of them are short, as many again and again: a tenth of
    a second tells little.
    """
    n_prefills = max(1, _PREFILLED // (n_streams * n_prompt))

    async def run(contender: Contender, make_prompts: MakePrompts, seed: int) -> Metrics:
        prompts = make_prompts((1 + n_prefills) * n_streams, n_prompt, seed)
        prefill_ms = 0.0
        for start in range(n_streams, len(prompts), n_streams):
            prefilled = await _answer_all(contender, prompts[start : start + n_streams], 1)
            prefill_ms += prefilled["ttft_max_ms"]
        before_s = cpu_s(contender.process, with_children=True)
        metrics = await _answer_all(contender, prompts[:n_streams], n_predict)
        took_s = cpu_s(contender.process, with_children=True) - before_s
        return metrics | {
            "prefill_per_s": 1000 * n_prefills * n_streams * n_prompt / prefill_ms,
            "prefill_ms": prefill_ms / n_prefills,
            "cpu_ms_per_token": 1000 * took_s / (n_streams * n_predict),
        }

    return Scenario(
        name=f"{model}: {n_prompt} tokens, {n_streams} streams",
        model=model,
        contenders=ALL,
        headline=("tok_per_s", "decode_per_s", "prefill_per_s", "ttft_ms", "cpu_ms_per_token"),
        run=run,
        is_quick=is_quick,
        targets=of_streams(n_streams),
    )


def shared_prefix(model: str, n_prefix: int, n_streams: int) -> Scenario:
    """One long beginning, many ends, all asked at once."""

    async def run(contender: Contender, make_prompts: MakePrompts, seed: int) -> Metrics:
        beginning = make_prompts(1, n_prefix, seed)[0]
        prompts = [f"{beginning} {index} and so on" for index in range(n_streams)]
        return await _answer_all(contender, prompts, 32)

    return Scenario(
        name=f"{model}: {n_streams} streams share {n_prefix} tokens",
        model=model,
        contenders=SERVERS,
        headline=("tok_per_s", "ttft_ms", "n_computed"),
        run=run,
        # Once, and the ends.
        targets=(at_most("n_computed", 1.2 * n_prefix),),
    )


def arrival(model: str, n_prompt: int) -> Scenario:
    """A long prompt arrives beside a streamed answer: how long does that one stand still?"""

    async def run(contender: Contender, make_prompts: MakePrompts, seed: int) -> Metrics:
        assert isinstance(contender, Server)
        short, long = make_prompts(1, 32, seed), make_prompts(1, n_prompt, seed + 1)
        url = f"{contender.url}/v1/completions"
        began = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            body = _body(contender, short[0], 160)
            running = tasks.create_task(client.stream(url, body, began=began, began_after=16))
            await began.wait()
            arrived_s = time.perf_counter()
            late = tasks.create_task(client.stream(url, _body(contender, long[0], 16)))
        stream = running.result()
        since_s = arrived_s - stream.started_s
        return {
            "stall_ms": 1000 * client.longest_gap_s(stream, since_s),
            "ttft_ms": 1000 * late.result().first_s,
        }

    return Scenario(
        name=f"{model}: {n_prompt} tokens arrive beside a stream",
        model=model,
        contenders=SERVERS,
        headline=("stall_ms", "ttft_ms"),
        run=run,
        is_quick=True,
        targets=(at_most("stall_ms", 300),) if model == "dense-200m" else (),
    )


def overhead(model: str, n_streams: int, *, n_predict: int) -> Scenario:
    """What the daemon adds to the worker's time to a first token, and its CPU for each later one.

    The kernel's and the client's part of the way, as a server that does nothing shows it in the
    same moments, is left out.
    """

    async def run(contender: Contender, make_prompts: MakePrompts, seed: int) -> Metrics:
        assert isinstance(contender, Server)
        assert contender.log is not None
        prompts = make_prompts(n_streams, 32, seed)
        url = f"{contender.url}/v1/completions"
        ids = [f"overhead-{seed}-{index}" for index in range(n_streams)]
        echoed: list[float] = []
        with echo() as nothing:
            async with asyncio.TaskGroup() as tasks:
                running, begun = [], []
                for prompt, request in zip(prompts, ids, strict=True):
                    begun.append(asyncio.Event())
                    body = _body(contender, prompt, n_predict)
                    one = client.stream(url, body, request_id=request, began=begun[-1])
                    running.append(tasks.create_task(one))
                    # One after the other: they are not to wait for each other.
                    await asyncio.sleep(_APART_S)
                    echoed.append((await client.stream(f"{nothing}/", body)).first_s)
                await asyncio.gather(*(one.wait() for one in begun))
                before_s, since_s = (
                    cpu_s(contender.process, with_children=False),
                    time.perf_counter(),
                )
        took_s = cpu_s(contender.process, with_children=False) - before_s
        found = [task.result() for task in running]
        n_tokens = sum(one.n_tokens - one.n_tokens_until(since_s - one.started_s) for one in found)
        lines = await _log_lines(contender.log, ids)
        added = [
            one.first_s - lines[request]["queue_s"] - lines[request]["prefill_s"]
            for one, request in zip(found, ids, strict=True)
        ]
        return {
            "added_ttft_ms": 1000 * (statistics.median(added) - statistics.median(echoed)),
            "echo_ms": 1000 * statistics.median(echoed),
            "daemon_cpu_ms_per_token": 1000 * took_s / n_tokens,
        }

    return Scenario(
        name=f"{model}: what the daemon adds at {n_streams} streams",
        model=model,
        contenders=("shimpy",),
        headline=("added_ttft_ms", "echo_ms", "daemon_cpu_ms_per_token"),
        run=run,
        is_quick=True,
        targets=(at_most("added_ttft_ms", ADDED_MS), at_most("daemon_cpu_ms_per_token", 0.1)),
    )


def schema(model: str) -> Scenario:
    """JSON by a schema beside free text of as many tokens, one request at a time."""

    async def run(contender: Contender, make_prompts: MakePrompts, seed: int) -> Metrics:
        assert isinstance(contender, Server)
        url = f"{contender.url}/v1/chat/completions"
        n_predict = 96
        wanted: dict[str, Any] = {"type": "json_object", "schema": _SCHEMA}
        if contender.name != "llama_cpp.server":
            wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}}

        def body(text: str) -> dict[str, Any]:
            message = {"role": "user", "content": text}
            asked = {"model": contender.model, "messages": [message], "temperature": 0}
            return {**asked, "max_tokens": n_predict}

        async with client.connect() as http:
            described = body(f"Describe the number {seed} as JSON.")
            made_s, made = await client.post(http, url, {**described, "response_format": wanted})
            free_s, free = await client.post(http, url, body(f"Tell me of {seed} at length."))
        n = made["usage"]["completion_tokens"]
        n_free = free["usage"]["completion_tokens"]
        return {
            "schema_ms_per_token": 1000 * made_s / n,
            "free_ms_per_token": 1000 * free_s / n_free,
            "schema_by_free": (made_s / n) / (free_s / n_free),
        }

    return Scenario(
        name=f"{model}: JSON by a schema",
        model=model,
        contenders=SERVERS,
        headline=("schema_ms_per_token", "schema_by_free"),
        run=run,
        is_quick=True,
        targets=(at_most("schema_by_free", 1.3),),
    )


def embeddings(model: str) -> Scenario:
    """Sixty-four short texts in one request."""

    async def run(contender: Contender, make_prompts: MakePrompts, seed: int) -> Metrics:
        assert isinstance(contender, Server)
        texts = [f"{'a short text ' * (1 + i % 5)}number {seed} {i}" for i in range(_SHORT_TEXTS)]
        body = {"model": contender.model, "input": texts}
        async with client.connect() as http:
            took_s, answer = await client.post(http, f"{contender.url}/v1/embeddings", body)
        assert len(answer["data"]) == _SHORT_TEXTS
        return {"texts_per_s": _SHORT_TEXTS / took_s, "took_ms": 1000 * took_s}

    return Scenario(
        name=f"{model}: embeddings of {_SHORT_TEXTS} short texts",
        model=model,
        contenders=SERVERS,
        headline=("texts_per_s",),
        run=run,
        is_quick=True,
        targets=(at_least("texts_per_s", 1 - NOISE, "xllamacpp"),),
    )


async def warm_up(
    contender: Contender, setup: Setup, make_prompts: MakePrompts | None = None
) -> None:
    """Let a contender load its model and use each of its slots once.

    The others' caches are zeroed as they are made. shimpy's takes its memory as it is used, and a
    few rounds would tell of that, and not of what comes after: with `make_prompts` its slots are
    used as deep as `setup.n_warm`.
    """
    prompts = [f"{index} times upon a time" for index in range(setup.n_slots)]
    if make_prompts is not None and contender.name == US:
        prompts = make_prompts(setup.n_slots, setup.n_warm, 0)
    if isinstance(contender, BareLoop):
        contender.ask(do="generate", prompts=prompts, n_predict=4)
        return
    async with client.connect() as http:
        if setup.embeds:
            wanted = {"model": contender.model, "input": ["one", "two"]}
            await client.post(http, f"{contender.url}/v1/embeddings", wanted)
            return
        url = f"{contender.url}/v1/completions"
        bodies = [_body(contender, prompt, 4) | {"stream": False} for prompt in prompts]
        # All at once are in as many slots.
        await asyncio.gather(*(client.post(http, url, body) for body in bodies))


async def _answer_all(contender: Contender, prompts: Sequence[str], n_predict: int) -> Metrics:
    if isinstance(contender, BareLoop):
        # As long as the servers' cores and caches have rested too.
        await asyncio.sleep(client.ACCEPTED_S)
        job = {"do": "generate", "prompts": list(prompts), "n_predict": n_predict}
        took = await asyncio.to_thread(contender.ask, **job)
        answers = [client.Stream(0.0, times, end_s=times[-1]) for times in took["arrivals_s"]]
        return client.speeds(answers)
    url = f"{contender.url}/v1/completions"
    found = await asyncio.gather(
        *(client.stream(url, _body(contender, prompt, n_predict)) for prompt in prompts)
    )
    metrics = client.speeds(found)
    usages = [one.usage for one in found if one.usage]
    if len(usages) == len(found):
        cached = [
            usage.get("prompt_tokens_details", {}).get("cached_tokens", 0) for usage in usages
        ]
        metrics["n_computed"] = sum(u["prompt_tokens"] for u in usages) - sum(cached)
    return metrics


def _body(server: Server, prompt: str, n_predict: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": n_predict,
        "temperature": 0,
        # The demo model's file asks for one, which the bare loop knows nothing of.
        "repeat_penalty": 1.0,
        "stream": True,
    }
    if server.name != "llama_cpp.server":
        body["stream_options"] = {"include_usage": True}
    return body


async def _log_lines(log: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the daemon's canonical lines of some requests, which come after their answers."""
    async with asyncio.timeout(10):
        while True:
            text = await asyncio.to_thread(log.read_text, encoding="utf-8")
            lines = text.splitlines()
            logged = [json.loads(line) for line in lines if line.startswith("{")]
            found = {one["request"]: one for one in logged if one.get("event") == "request"}
            if found.keys() >= set(ids):
                return found
            await asyncio.sleep(0.01)


def all_scenarios() -> list[Scenario]:
    """Return everything that is measured of running servers."""
    return [
        streams("dense-200m", 32, 1, n_predict=128, is_quick=True),
        streams("dense-200m", 32, 4),
        streams("dense-200m", 32, 8, is_quick=True),
        streams("dense-200m", 32, 16),
        streams("dense-200m", 256, 1, is_quick=True),
        streams("dense-200m", 256, 4),
        streams("dense-200m", 256, 8, is_quick=True),
        streams("dense-200m", 2000, 1, n_predict=32),
        streams("dense-200m", 2000, 4, n_predict=32),
        shared_prefix("dense-200m", 2000, 8),
        arrival("dense-200m", 1500),
        overhead("dense-200m", 8, n_predict=96),
        schema("dense-200m"),
        streams("moe-300m", 32, 1, n_predict=128),
        streams("moe-300m", 32, 8),
        streams("moe-300m", 256, 1),
        streams("moe-300m", 256, 8),
        streams("moe-300m", 2000, 1, n_predict=32),
        arrival("moe-300m", 1500),
        streams("demo", 32, 1, n_predict=128),
        streams("demo", 32, 8, n_predict=128),
        streams("demo", 256, 1, n_predict=128),
        streams("demo", 256, 8, n_predict=128),
        overhead("demo", 8, n_predict=512),
        schema("demo"),
        streams("deepseek-8b", 32, 1, n_predict=16),
        streams("deepseek-8b", 256, 4, n_predict=16),
        embeddings("bert"),
    ]
