"""A worker without llama.cpp: speaks the protocol, and does what its script says.

It is started like the real one (`python fake_engine.py --fd N`). What the worker of a model
does is in a script beside the model's file (see Script), read at Load. Where it is to wait for
the test, it opens a FIFO for reading; the test lets it go on by opening it for writing: no
sleeping, no polling.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shimpy.protocol.codec import encode_frame, worker_decoder
from shimpy.protocol.messages import (
    PROTOCOL_VERSION,
    BufferUse,
    Cancel,
    Delta,
    Done,
    Embed,
    Embedded,
    Events,
    Failed,
    Hello,
    Load,
    LoadFailed,
    Loading,
    Prefilled,
    Ready,
    SetThreads,
    Shutdown,
    Submit,
    ToDaemon,
    Tokenize,
    Tokenized,
)

Death = Literal[
    "exit", "abort", "segv", "bus", "kill", "cuda_oom", "host_oom", "garbage", "hang_up"
]


@dataclass(kw_only=True)
class Script:
    """What the worker of one model does; kept beside the model's file."""

    # FIFOs at Load: one gets a word, then one is waited for.
    load_tells: str | None = None
    load_gate: str | None = None
    # How the load ends, if not in Ready.
    load_fails: str | None = None
    load_out_of_memory: bool = False
    # A load that puts layers on a GPU runs out of memory.
    fails_on_gpu: bool = False
    # Ways to die: before Ready, at the first Submit, after some text of it, or on a gate.
    dies_loading: Death | None = None
    dies_on_submit: Death | None = None
    dies_after_text: Death | None = None
    # A FIFO that each generation waits for between its first and its second half.
    text_gate: str | None = None
    text: str = "Once upon a time"
    # Repeats the text this often, without waiting for the reader.
    n_repeat: int = 1
    # Takes neither the Shutdown frame nor SIGTERM.
    is_deaf: bool = False
    # A FIFO that gets a word when a Cancel arrives.
    cancel_tells: str | None = None
    # The file of a memory cgroup that takes the processes, for "host_oom".
    cgroup: str | None = None
    prints: list[str] = field(default_factory=list)
    memory: list[tuple[str, int]] = field(default_factory=list)
    load_s: float = 0.01

    def save(self, model: Path) -> None:
        """Put the script beside a model's file."""
        _script_path(model).write_text(json.dumps(vars(self)), encoding="utf-8")

    @classmethod
    def read(cls, model: Path) -> Script:
        path = _script_path(model)
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()


def _script_path(model: Path) -> Path:
    return model.with_suffix(".script")


class FakeEngine:
    """Reads frames until EOF; a thread per generation, so that Cancel is heard meanwhile."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._send_lock = threading.Lock()
        self._cancelled: set[int] = set()
        self._script = Script()
        self._threads = 0

    def run(self) -> None:
        version = int(os.environ.get("FAKE_ENGINE_VERSION", PROTOCOL_VERSION))
        self._send(Hello(version))
        decoder = worker_decoder()
        while data := self._channel.recv(65536):
            for message in decoder.feed(data):
                self._on_message(message)
        os._exit(0)

    def _on_message(self, message: object) -> None:
        match message:
            case Load():
                self._load(message)
            case Submit():
                threading.Thread(target=self._generate, args=(message,), daemon=True).start()
            case Embed():
                self._send(
                    Embedded(request=message.request, n_embd=1, data=b"\0\0\0\0", n_tokens=1)
                )
            case Tokenize():
                pieces = [message.text.encode()] if message.wants_pieces else []
                self._send(
                    Tokenized(request=message.request, ids=[1], text=message.text, pieces=pieces)
                )
            case Cancel():
                self._cancelled.add(message.request)
                _tell(self._script.cancel_tells)
            case SetThreads():
                self._threads = message.n_threads
            case Shutdown():
                if not self._script.is_deaf:
                    os._exit(0)

    def _load(self, load: Load) -> None:
        self._script = script = Script.read(Path(load.path))
        self._threads = load.n_threads
        if script.is_deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for line in script.prints:
            _print(line)
        self._send(Loading(fraction=0.5))
        _tell(script.load_tells)
        _wait(script.load_gate)
        if script.dies_loading is not None:
            self._die(script.dies_loading)
        on_gpu = script.fails_on_gpu and load.n_gpu_layers > 0
        if script.load_fails is not None or on_gpu:
            message = script.load_fails or "no memory on the GPU"
            out_of_memory = script.load_out_of_memory or on_gpu
            self._send(LoadFailed(message=message, out_of_memory=out_of_memory))
            return
        self._send(
            Ready(
                memory=[
                    BufferUse(device=device, model_bytes=size, context_bytes=0, compute_bytes=0)
                    for device, size in script.memory
                ],
                n_ctx=load.n_ctx,
                n_ctx_train=load.n_ctx,
                n_slots=load.n_slots,
                n_vocab=512,
                n_embd=1,
                load_s=script.load_s,
                is_mapped=load.load_mode == "mmap",
            )
        )

    def _generate(self, submit: Submit) -> None:
        script, request = self._script, submit.request
        if script.dies_on_submit is not None:
            self._die(script.dies_on_submit)
        if submit.n_predict == 0:
            self._send_event(
                Failed(
                    request=request,
                    code="context_exceeded",
                    message="the prompt is too long",
                    n_prompt=9,
                    n_ctx=8,
                )
            )
            return
        half = len(script.text) // 2
        self._send_event(Prefilled(request=request, n_prompt=3, n_cached=0))
        for _ in range(script.n_repeat):
            self._send_event(Delta(request=request, text=script.text[:half], n_tokens=1))
            if script.dies_after_text is not None:
                self._die(script.dies_after_text)
            _wait(script.text_gate)
            self._send_event(Delta(request=request, text=script.text[half:], n_tokens=1))
        reason = "cancelled" if request in self._cancelled else "stop"
        self._send_event(
            Done(
                request=request,
                reason=reason,
                n_prompt=3,
                n_cached=0,
                n_generated=2,
                prefill_s=0.0,
                decode_s=0.0,
                queue_s=float(self._threads),
            )
        )

    def _die(self, death: Death) -> None:  # noqa: C901 - a case for each death
        match death:
            case "exit":
                os._exit(7)
            case "abort":
                _print("GGML_ASSERT(n_tokens <= n_batch) failed")
                os.abort()
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "bus":
                os.kill(os.getpid(), signal.SIGBUS)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "cuda_oom":
                _print("CUDA error: out of memory")
                os.abort()
            case "host_oom":
                assert self._script.cgroup is not None, "it says which memory to run out of"
                Path(self._script.cgroup).write_text(str(os.getpid()), encoding="ascii")
                hog = bytearray()
                while True:
                    hog += os.urandom(1024 * 1024)
            case "garbage":
                with self._send_lock:
                    self._channel.sendall(b"\x04\x00\x00\x00!!!!")
            case "hang_up":
                self._channel.shutdown(socket.SHUT_WR)
        threading.Event().wait()

    def _send_event(self, event: Delta | Prefilled | Done | Failed) -> None:
        self._send(Events(events=[event]))

    def _send(self, message: ToDaemon) -> None:
        with self._send_lock:
            self._channel.sendall(encode_frame(message))


def _print(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _wait(fifo: str | None) -> None:
    """Wait until somebody has opened the FIFO for writing and closed it."""
    if fifo is not None:
        Path(fifo).read_bytes()


def _tell(fifo: str | None) -> None:
    """Wait until somebody has read a word from the FIFO."""
    if fifo is not None:
        Path(fifo).write_text("here", encoding="ascii")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    channel = socket.socket(fileno=parser.parse_args().fd)
    FakeEngine(channel).run()


if __name__ == "__main__":
    main()
