"""Start the worker: `--fd N` serves a model on an inherited socket, `--devices` lists devices.

`--simulate` tells what the loads would take that stdin lists, without allocating anything.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from shimpy.engine.backend import Backend
from shimpy.engine.channel import Channel
from shimpy.engine.intake import Intake
from shimpy.engine.loop import Engine
from shimpy.engine.parked import ParkedPrefixes, can_park, reserve_files
from shimpy.engine.prefix_store import PrefixStore
from shimpy.engine.prefixes import SavedPrefixes
from shimpy.errors import LoadError, ProtocolError, ShimpyError
from shimpy.protocol.messages import (
    PROTOCOL_VERSION,
    Hello,
    Load,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
)

_PROGRESS_STEP = 0.01


class OpenBackend(Protocol):
    """Loads a model; shimpy.engine.llama.open_backend is one."""

    def __call__(self, load: Load, *, on_progress: Callable[[float], bool]) -> Backend:
        """Return the loaded model; `on_progress` answers whether to go on.

        Raises:
            LoadError: it can't be loaded.
        """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m shimpy.engine", description=__doc__)
    duty = parser.add_mutually_exclusive_group(required=True)
    duty.add_argument("--fd", type=int, help="an inherited socket to the daemon")
    duty.add_argument("--devices", action="store_true", help="print the devices as JSON")
    duty.add_argument(
        "--simulate", action="store_true", help="print what the loads from stdin would take"
    )
    arguments = parser.parse_args(argv)
    # An abort in ggml would start a debugger to print a backtrace.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    if arguments.devices:
        print_devices()
        return 0
    if arguments.simulate:
        print_simulated()
        return 0
    return serve(Channel(socket.socket(fileno=arguments.fd)), import_llama)


def print_devices() -> None:
    """Write what this build of llama.cpp can use to stdout."""
    from shimpy.engine.llama import list_devices

    sys.stdout.buffer.write(msgspec.json.encode(list_devices()) + b"\n")


def print_simulated() -> None:
    """Read a list of Load as JSON from stdin; write a Simulated for each, a line each.

    At once when it is known: an assertion of llama.cpp in a later one loses none of them.
    """
    from shimpy.engine.llama import simulate

    loads = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Load])
    for simulated in simulate(loads):
        sys.stdout.buffer.write(msgspec.json.encode(simulated) + b"\n")
        sys.stdout.buffer.flush()


def import_llama() -> OpenBackend:
    """Return what loads models with llama.cpp; importing it takes 0.15 s."""
    from shimpy.engine.llama import open_backend

    return open_backend


def serve(channel: Channel, prepare: Callable[[], OpenBackend]) -> int:
    """Serve one model on a channel until Shutdown; return the exit status.

    `prepare` is called between Hello and Load, so that a spare worker waits ready. The process
    ends at once when the daemon is gone, even in the middle of a load.
    """
    try:
        return _serve(channel, prepare)
    except ConnectionError:
        # A send found the daemon gone before the reader thread did.
        return 0


def _serve(channel: Channel, prepare: Callable[[], OpenBackend]) -> int:
    reserve_files()
    intake = Intake(send=channel.send, clock=time.monotonic)
    _take_signals(intake)
    channel.send(Hello(PROTOCOL_VERSION))
    open_backend = prepare()
    messages = channel.receive()
    load = next(messages, None)
    if load is None or isinstance(load, Shutdown):
        return 0
    if not isinstance(load, Load):
        raise ProtocolError(f"the first message is {type(load).__name__}, not Load")
    threading.Thread(target=intake.run, args=(messages,), name="reader", daemon=True).start()
    started_s = time.monotonic()
    try:
        backend = open_backend(load, on_progress=_Progress(channel))
    except ShimpyError as error:
        out_of_memory = isinstance(error, LoadError) and error.out_of_memory
        channel.send(LoadFailed(error.message, out_of_memory=out_of_memory))
        return 1
    embeds = load.embedding or backend.has_encoder
    intake.serve(backend, embeds=embeds)
    channel.send(_ready(backend, time.monotonic() - started_s))
    prefixes = _open_prefixes(load, backend, channel) if load.prefix_dir and not embeds else None
    engine = Engine(
        backend,
        inbox=intake.inbox,
        send=channel.send,
        clock=time.monotonic,
        n_ubatch=load.n_ubatch,
        embeds=embeds,
        prefixes=prefixes,
        parked=None if embeds else _open_parked(load, backend, prefixes),
        # Flash attention skips what a token does not see.
        attends_idle=load.flash_attn == "off" and load.kv_unified,
        uses_gpu=bool(load.devices),
    )
    # What is here now stays: a full collection would look at all of it, between two tokens.
    gc.freeze()
    engine.run()
    backend.close()
    return 0


def _open_prefixes(load: Load, backend: Backend, channel: Channel) -> PrefixStore | None:
    try:
        return PrefixStore(load, backend, send=channel.send)
    except FileNotFoundError:
        # The model's file went away as it was loaded.
        return None


def _open_parked(
    load: Load, backend: Backend, prefixes: PrefixStore | None
) -> ParkedPrefixes | None:
    if not load.parked_cache_bytes or not can_park():
        return None
    if prefixes is None:
        saved = SavedPrefixes(whole=backend.state_is_whole, can_cut=backend.can_split)
    else:
        saved = prefixes.saved
    return ParkedPrefixes(backend, saved, limit=load.parked_cache_bytes)


class _Progress:
    """Tells the daemon how far a load is, in steps of a hundredth."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._told = 0.0

    def __call__(self, fraction: float) -> bool:
        if fraction - self._told >= _PROGRESS_STEP:
            self._told = fraction
            self._channel.send(Loading(fraction))
        return True


def _take_signals(intake: Intake) -> None:
    """Let SIGTERM mean Shutdown, and SIGINT nothing: in a terminal it is meant for the daemon.

    A thread waits for SIGTERM, because Python's own handlers wait for the main thread, which
    may be in llama.cpp for a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_term() -> None:
        signal.sigwait({signal.SIGTERM})
        intake.on_message(Shutdown())

    threading.Thread(target=wait_for_term, name="sigterm", daemon=True).start()


def _ready(backend: Backend, load_s: float) -> Ready:
    def name(token: int) -> str:
        return backend.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    return Ready(
        memory=backend.memory(),
        n_ctx=backend.n_ctx,
        n_ctx_train=backend.n_ctx_train,
        n_slots=backend.n_slots,
        n_vocab=backend.n_vocab,
        n_embd=backend.n_embd,
        load_s=load_s,
        has_fim=backend.has_fim,
        has_encoder=backend.has_encoder,
        add_bos=backend.add_bos,
        bos_text=name(backend.bos_id),
        eos_text=name(backend.eos_id),
        n_overridden=backend.n_overridden,
        untouched_bytes=backend.untouched_bytes,
        is_mapped=backend.is_mapped,
    )


if __name__ == "__main__":
    sys.exit(main())
