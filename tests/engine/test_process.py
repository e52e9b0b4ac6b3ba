"""How a worker process starts and ends: with its daemon, by signals, by its own failures."""

from __future__ import annotations

import signal
import struct
import threading
from collections.abc import Callable

import msgspec
import pytest

from shimpy.protocol.messages import (
    PROTOCOL_VERSION,
    BuildInfo,
    Cancel,
    Failed,
    Hello,
    Load,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    Submit,
    Text,
    Tokenize,
)
from tests.engine.worker import TIMEOUT_S, Worker, run_engine

FAKE = "tests.engine.fake_worker"
Busy = Callable[[Worker], None]


def waiting_for_load(worker: Worker) -> None:
    assert isinstance(worker.receive(), Hello)


def stuck_in_a_load(worker: Worker) -> None:
    waiting_for_load(worker)
    worker.send(Load("stuck-load", 256))
    assert worker.receive() == Loading(0.5)
    worker.wait_for_line("stuck")


def idle(worker: Worker) -> None:
    worker.load("model", n_ctx=256)


def stuck_in_a_decode(worker: Worker) -> None:
    worker.load("stuck-decode", n_ctx=256)
    worker.submit(1, "hi")
    worker.wait_for_line("stuck")


def streaming(worker: Worker) -> None:
    worker.load("model", n_ctx=256)
    for request in range(40):
        worker.submit(request, f"hi {request}", shift=True)
    worker.hear()


def read_to_the_end(worker: Worker) -> None:
    """Do as the daemon does, which always reads: a worker waits for room in its socket."""
    while worker.connection.recv(1 << 16):
        pass


every_state = pytest.mark.parametrize(
    "state",
    [waiting_for_load, stuck_in_a_load, idle, stuck_in_a_decode, streaming],
    ids=lambda state: state.__name__,
)


@every_state
def test_the_process_ends_with_its_daemon(state: Busy) -> None:
    with Worker.start(module=FAKE) as worker:
        state(worker)
        worker.connection.close()
        assert worker.process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("state", [stuck_in_a_load, idle], ids=lambda state: state.__name__)
def test_control_c_in_a_terminal_is_not_for_the_worker(state: Busy) -> None:
    with Worker.start(module=FAKE) as worker:
        state(worker)
        worker.process.send_signal(signal.SIGINT)
        worker.connection.close()
        assert worker.process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(
    "state", [waiting_for_load, stuck_in_a_load, idle, streaming], ids=lambda state: state.__name__
)
def test_sigterm_ends_it_orderly(state: Busy) -> None:
    with Worker.start(module=FAKE) as worker:
        state(worker)
        worker.process.send_signal(signal.SIGTERM)
        read_to_the_end(worker)
        assert worker.process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(
    "state", [waiting_for_load, stuck_in_a_load, idle, streaming], ids=lambda state: state.__name__
)
def test_shutdown_ends_it_orderly(state: Busy) -> None:
    with Worker.start(module=FAKE) as worker:
        state(worker)
        worker.send(Shutdown())
        read_to_the_end(worker)
        assert worker.process.wait(TIMEOUT_S) == 0


def test_running_requests_are_told_of_the_shutdown() -> None:
    with Worker.start(module=FAKE) as worker:
        worker.load("model", n_ctx=256)
        worker.submit(1, "hi", shift=True, n_predict=10**6)
        worker.submit(2, "ho", shift=True, n_predict=10**6)
        worker.send(Shutdown())
        for told in worker.finish(1, 2):
            assert told.done.reason in ("cancelled", "stop", "length")
        assert worker.process.wait(TIMEOUT_S) == 0


def test_it_says_hello_at_once_with_its_version() -> None:
    with Worker.start(module=FAKE) as worker:
        hello = worker.receive()
        assert hello == Hello(PROTOCOL_VERSION)


def test_a_load_is_followed_and_then_ready() -> None:
    with Worker.start(module=FAKE) as worker:
        assert isinstance(worker.receive(), Hello)
        worker.send(Load("model", 256, n_slots=3))
        assert worker.receive() == Loading(0.5)
        ready = worker.receive()
        assert isinstance(ready, Ready)
        assert (ready.n_ctx, ready.n_slots, ready.bos_text) == (256, 3, "<s>")


def test_a_load_that_fails_says_why_and_ends_the_process() -> None:
    with Worker.start(module=FAKE) as worker:
        assert isinstance(worker.receive(), Hello)
        worker.send(Load("no-memory", 256))
        assert worker.receive() == Loading(0.5)
        assert worker.receive() == LoadFailed(
            "CUDA0 lacks 2.0 GiB; lower num_ctx", out_of_memory=True
        )
        assert worker.process.wait(TIMEOUT_S) == 1


def test_a_request_before_the_model_is_there_is_refused() -> None:
    with Worker.start(module=FAKE) as worker:
        stuck_in_a_load(worker)
        worker.send(Tokenize(5, "hi"))
        assert worker.receive() == Failed(5, "worker", "the worker has no model yet")


@pytest.mark.parametrize(
    "data",
    [struct.pack("<I", 2**31), struct.pack("<I", 5) + b"<html", struct.pack("<I", 0)],
    ids=["absurd length", "no message", "empty"],
)
def test_bytes_that_are_no_message_end_it_with_a_status(data: bytes) -> None:
    with Worker.start(module=FAKE) as worker:
        worker.load("model", n_ctx=256)
        worker.connection.sendall(data)
        assert worker.process.wait(TIMEOUT_S) == 1


def test_a_first_message_that_is_not_load_ends_it_with_a_status() -> None:
    with Worker.start(module=FAKE) as worker:
        assert isinstance(worker.receive(), Hello)
        worker.send(Cancel(1))
        assert worker.process.wait(TIMEOUT_S) == 1


def test_tokenize_is_answered_while_a_decode_runs() -> None:
    with Worker.start(module=FAKE) as worker:
        stuck_in_a_decode(worker)
        worker.send(Tokenize(7, "ab"))
        worker.hear_until(lambda: bool(worker.told[7].ends))
        assert worker.told[7].end.ids == [97, 98]


def test_a_full_socket_is_no_deadlock() -> None:
    """The loop and the reader thread both wait for the daemon to read, and then go on."""
    n_requests = 300
    with Worker.start(module=FAKE, buffer_bytes=4096) as worker:
        worker.load("model", n_ctx=256, n_batch=64)

        def send_all() -> None:
            for request in range(n_requests):
                worker.send(Submit(request, [Text("x" * 100)], n_predict=4, return_tokens=True))
                worker.send(Tokenize(10_000 + request, "y" * 500))

        sender = threading.Thread(target=send_all)
        sender.start()
        worker.finish(*range(n_requests), *range(10_000, 10_000 + n_requests))
        sender.join(TIMEOUT_S)


def test_the_devices_are_printed_as_json() -> None:
    done = run_engine("--devices")
    info = msgspec.json.decode(done.stdout, type=BuildInfo)
    assert done.returncode == 0
    assert any(device.kind == "cpu" and device.total_bytes > 0 for device in info.devices)


def test_without_a_duty_it_says_how_it_is_used() -> None:
    done = run_engine()
    assert done.returncode == 2
    assert b"--fd" in done.stderr
