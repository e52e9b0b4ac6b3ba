"""A real worker process with a synchronous end of its channel."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from shimpy.protocol.codec import daemon_decoder, encode_frame
from shimpy.protocol.messages import (
    Embedded,
    Events,
    Failed,
    Hello,
    Load,
    Loading,
    PromptPart,
    Ready,
    Sampling,
    Shutdown,
    Stats,
    Submit,
    Text,
    ToDaemon,
    Tokenized,
    ToWorker,
)
from tests.engine.harness import Told

TIMEOUT_S = 30.0
GREEDY = Sampling(temperature=0.0)


def run_engine(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the worker's program to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shimpy.engine", *arguments],
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )


class Worker:
    """Speaks with one worker; what requests are told is put together in `told`."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.connection = connection
        self.told: dict[int, Told] = defaultdict(Told)
        self.stats: list[Stats] = []
        self.n_event_frames = 0
        self._decoder = daemon_decoder()
        self._messages: list[ToDaemon] = []

    @classmethod
    @contextmanager
    def start(
        cls, *, module: str = "shimpy.engine", buffer_bytes: int | None = None
    ) -> Iterator[Self]:
        """Start a process; whatever the test does to it, it is gone afterwards."""
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        if buffer_bytes is not None:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parent.parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            theirs.close()
            with process:
                try:
                    yield cls(process, ours)
                finally:
                    process.kill()

    @classmethod
    @contextmanager
    def serving(cls, model: Path, **options: Any) -> Iterator[Self]:
        """Start a process with a model in place, and check that it leaves when it is told to."""
        with cls.start() as worker:
            worker.load(model, **options)
            yield worker
            worker.send(Shutdown())
            assert worker.process.wait(TIMEOUT_S) == 0

    def wait_for_line(self, line: str) -> None:
        """Wait until the process writes a line to stdout."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline().decode().strip() == line

    def load(self, model: Path | str, **options: Any) -> Ready:
        assert isinstance(self.receive(), Hello)
        self.send(Load(str(model), **{"n_ctx": 1024, "n_slots": 8, **options}))
        while isinstance(message := self.receive(), Loading):
            pass
        assert isinstance(message, Ready), message
        return message

    def send(self, message: ToWorker) -> None:
        self.connection.sendall(encode_frame(message))

    def receive(self) -> ToDaemon:
        while not self._messages:
            data = self.connection.recv(1 << 16)
            assert data, f"the worker is gone, status {self.process.wait(TIMEOUT_S)}"
            self._messages += self._decoder.feed(data)
        return self._messages.pop(0)

    def submit(self, request: int, prompt: str | list[PromptPart], **options: Any) -> None:
        parts = [Text(prompt, parse_special=True)] if isinstance(prompt, str) else prompt
        self.send(Submit(request, parts, **{"sampling": GREEDY, **options}))

    def hear(self) -> None:
        """Receive one message and give it to its request."""
        match self.receive():
            case Events(events=events, stats=stats):
                self.n_event_frames += bool(events)
                for event in events:
                    self.told[event.request].hear(event)
                if stats is not None:
                    self.stats.append(stats)
            case (Failed() | Embedded() | Tokenized()) as answer:
                self.told[answer.request].hear(answer)
            case message:
                raise AssertionError(message)

    def hear_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.hear()

    def finish(self, *requests: int) -> list[Told]:
        """Wait for the end of these requests."""
        self.hear_until(lambda: all(self.told[request].ends for request in requests))
        return [self.told[request] for request in requests]

    def generate(self, request: int, prompt: str | list[PromptPart], **options: Any) -> Told:
        """Submit one request and wait for its end."""
        self.submit(request, prompt, **options)
        return self.finish(request)[0]
