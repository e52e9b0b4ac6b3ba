"""What `shimpy ps` prints of an answer of /api/ps."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from shimpy.cli.ps import print_state
from shimpy.units import GIB


def use(name: str, weights: int, *, real: bool = True) -> dict[str, Any]:
    sizes = {
        "weights_bytes": weights * GIB,
        "kv_bytes": GIB,
        "compute_bytes": GIB // 2,
        "total_bytes": weights * GIB + GIB + GIB // 2,
    }
    process = {"overhead_bytes": GIB // 4, "total_bytes": sizes["total_bytes"] + GIB // 4}
    return {**sizes, **process, "name": name, "real": sizes if real else None}


def resident(**changes: Any) -> dict[str, Any]:
    expires = datetime.now(UTC) + timedelta(minutes=4, seconds=59.9)
    return {
        "name": "qwen3:30b-a3b-q4_k_m",
        "state": "ready",
        "load_fraction": 1.0,
        "context_length": 131072,
        "n_threads": 16,
        "pinned": False,
        "n_leases": 4,
        "n_waiting": 12,
        "parked_bytes": 0,
        "expires_at": expires.isoformat(),
        "placement": {
            "mode": "experts-in-ram",
            "n_slots": 4,
            "n_layers": 48,
            "n_gpu_layers": 49,
            "moe_layers_in_ram": 40,
            "figures": "exact",
            "devices": [use("CUDA0", 17)],
            "host": use("", 12),
        },
    } | changes


def waiting(**changes: Any) -> dict[str, Any]:
    return {
        "name": "other:latest",
        "n_waiting": 2,
        "n_deaths": 0,
        "last_death": "",
        "held_until_s": None,
        "reason": "its memory is held by qwen3:30b-a3b-q4_k_m",
    } | changes


def printed(capsys: pytest.CaptureFixture[str], **state: Any) -> list[str]:
    print_state({"models": [], "waiting": [], "recent": []} | state)
    return capsys.readouterr().out.splitlines()


def test_a_model_over_two_devices_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    header, row, _, below, gpu, ram = printed(capsys, models=[resident()])
    assert max(len(line.rstrip()) for line in (header, row, below, gpu, ram)) <= 100
    assert "GPU, experts 40/48 in RAM" in row
    assert "4, 12 wait" in row
    assert row.rstrip().endswith("in 5m0s")
    assert gpu.split()[:2] == ["qwen3:30b-a3b-q4_k_m", "CUDA0"]
    assert gpu.endswith("18.5 GiB  18.5 GiB, exact  + 256.0 MiB")
    assert ram.split()[1] == "RAM"


def test_parked_caches_have_a_row_once_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, models=[resident(parked_bytes=GIB)])
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert len(lines) == 7
    _, *cells = lines[-1].split()
    assert " ".join(cells) == "RAM - 1.0 GiB - 1.0 GiB parked caches -"
    for loading in (None, 0):
        assert len(printed(capsys, models=[resident(parked_bytes=loading)])) == 6


def test_a_model_that_loads_has_predictions_alone(capsys: pytest.CaptureFixture[str]) -> None:
    host, placement = use("", 12, real=False), resident()["placement"]
    loading = resident(
        state="loading", load_fraction=0.43, placement=placement | {"devices": [], "host": host}
    )
    lines = printed(capsys, models=[loading])
    assert "loading 43%" in lines[1]
    assert lines[-1].split()[1:] == [
        "RAM",
        "-",
        "-",
        "-",
        "-",
        "13.5",
        "GiB,",
        "exact",
        "+",
        "256.0",
        "MiB",
    ]


def test_a_pinned_model_has_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, models=[resident(pinned=True)])[1].rstrip().endswith("  pinned")


def test_why_a_model_is_not_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    held = waiting(
        name="bad:latest",
        n_waiting=0,
        n_deaths=3,
        last_death="was aborted by llama.cpp: GGML_ASSERT(x)",
        held_until_s=time.time() + 9.7,
    )
    lines = printed(capsys, waiting=[waiting(), held])
    assert [line.partition("ASSERT")[0] for line in lines[-3:]] == [
        "NOT LOADED",
        "other:latest  2 requests wait: its memory is held by qwen3:30b-a3b-q4_k_m",
        "bad:latest  held back for 10s: 3 deaths, the last worker was aborted by llama.cpp: GGML_",
    ]


def test_why_models_have_left(capsys: pytest.CaptureFixture[str]) -> None:
    event = {"kind": "evict", "model": "a:latest", "reason": "for b:latest", "at_s": time.time()}
    lines = printed(capsys, recent=[event] * 9)
    assert lines[-6] == "RECENTLY"
    assert lines[-1].split()[1:] == ["evict", "a:latest", "for", "b:latest"]
