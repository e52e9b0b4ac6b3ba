"""How the end of a process is read."""

from __future__ import annotations

import signal

import pytest

from shimpy.scheduler.exits import ExitKind, WorkerExit, classify_exit, quote_lines


@pytest.mark.parametrize(
    ("returncode", "lines", "n_kills", "kind", "reason"),
    [
        (-signal.SIGKILL, [], 1, ExitKind.HOST_OUT_OF_MEMORY, "the host ran out of memory"),
        (-signal.SIGKILL, [], 0, ExitKind.KILLED, "SIGKILL from outside"),
        (-signal.SIGKILL, [], None, ExitKind.KILLED, "SIGKILL from outside"),
        (-signal.SIGTERM, [], 0, ExitKind.KILLED, "SIGTERM from outside"),
        (-signal.SIGBUS, [], 0, ExitKind.FILE_CHANGED, "cut short or changed"),
        (-signal.SIGSEGV, ["loading"], 0, ExitKind.CRASHED, "crashed with SIGSEGV: loading"),
        (-signal.SIGRTMIN - 1, [], 0, ExitKind.CRASHED, "crashed with signal 35"),
        (
            -signal.SIGABRT,
            ["llama_decode", "ggml.c:1: GGML_ASSERT(x) failed", "0x7f"],
            0,
            ExitKind.ABORTED,
            "aborted by llama.cpp: ggml.c:1: GGML_ASSERT(x) failed",
        ),
        (
            -signal.SIGABRT,
            ["CUDA error: out of memory", "  current device: 0"],
            0,
            ExitKind.GPU_OUT_OF_MEMORY,
            "ran out of GPU memory: CUDA error: out of memory",
        ),
        (1, ["ImportError: no llama"], 0, ExitKind.FAILED, "status 1: ImportError: no llama"),
        (1, [], 0, ExitKind.FAILED, "status 1"),
        (0, [], 0, ExitKind.ENDED, "ended by itself"),
    ],
)
def test_classified(
    returncode: int, lines: list[str], n_kills: int | None, kind: ExitKind, reason: str
) -> None:
    end = classify_exit(returncode, last_lines=lines, n_oom_kills=n_kills)
    assert end.kind is kind
    assert reason in end.reason
    assert end.returncode == returncode


@pytest.mark.parametrize("kind", ExitKind)
def test_only_a_lack_of_memory_is_worth_a_smaller_placement(kind: ExitKind) -> None:
    end = WorkerExit(kind=kind, reason="", returncode=None)
    assert end.out_of_memory == kind.value.endswith("out_of_memory")


def test_quotes_what_tells_most() -> None:
    assert quote_lines([]) == ""
    assert quote_lines(["", " a ", "b", "c", "d"]) == ": b | c | d"
    assert quote_lines(["error: x", "a", "b", "c"]) == ": error: x"
