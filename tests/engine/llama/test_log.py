"""llama.cpp's log lines, whole and in parts."""

from __future__ import annotations

import pytest

from shimpy.engine.llama.log import BufferLine, NativeLog

DEBUG, INFO, WARN, ERROR, CONT = 1, 2, 3, 4, 5


@pytest.fixture
def log() -> NativeLog:
    return NativeLog()


def test_errors_are_kept_in_order(log: NativeLog) -> None:
    for level, line in ((ERROR, b"first\n"), (INFO, b"news\n"), (ERROR, b"second\n")):
        log.take(level, line)
    assert log.errors() == ["first", "second"]
    assert log.errors(1) == ["second"]
    log.clear()
    assert log.errors() == []


def test_a_line_in_parts_has_the_level_of_its_first(log: NativeLog) -> None:
    log.take(ERROR, b"out of ")
    log.take(CONT, b"memo")
    assert log.errors() == []
    log.take(CONT, b"ry\n")
    assert log.errors() == ["out of memory"]


def test_several_lines_may_come_at_once(log: NativeLog) -> None:
    log.take(ERROR, b"one\ntwo\n\n")
    assert log.errors() == ["one", "two"]


def test_errors_are_bounded(log: NativeLog) -> None:
    for i in range(10_000):
        log.take(ERROR, b"%d\n" % i)
    assert len(log.errors(10**6)) < 1000
    assert log.errors(1) == ["9999"]


def test_buffers_are_read(log: NativeLog) -> None:
    log.take(INFO, b"load_tensors:   CPU_Mapped model buffer size =  5063.89 MiB\n")
    log.take(INFO, b"llama_kv_cache:      CUDA0 KV buffer size =   896.00 MiB\n")
    log.take(INFO, b"sched_reserve:  CUDA_Host compute buffer size =     2.01 MiB\n")
    assert list(log.buffers) == [
        BufferLine("CPU_Mapped", "model", 5063.89),
        BufferLine("CUDA0", "KV", 896.0),
        BufferLine("CUDA_Host", "compute", 2.01),
    ]


def test_the_log_goes_on_to_stderr(log: NativeLog, capfd: pytest.CaptureFixture[str]) -> None:
    """But for what is said of every tensor, unless it was put elsewhere."""
    log.take(DEBUG, b"create_tensor: loading tensor output.weight\n")
    log.take(
        DEBUG, b"tensor blk.1.ffn_up_exps.weight (99 MiB q4_K) buffer type overridden to CPU\n"
    )
    log.take(WARN, b"careful\n")
    assert capfd.readouterr().err.splitlines() == [
        "tensor blk.1.ffn_up_exps.weight (99 MiB q4_K) buffer type overridden to CPU",
        "careful",
    ]
    assert log.n_overridden == 1


def test_bytes_that_are_no_text_are_no_crash(log: NativeLog) -> None:
    log.take(ERROR, b"token \xff\xfe\n")
    assert log.errors() == ["token \ufffd\ufffd"]
