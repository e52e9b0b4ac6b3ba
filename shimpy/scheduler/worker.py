"""A worker's process: started, fed with frames, read until its end, and always reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from shimpy.errors import CapacityError, ProtocolError, WorkerDiedError
from shimpy.logs import get_logger
from shimpy.protocol.codec import daemon_decoder, encode_frame
from shimpy.protocol.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Events,
    Hello,
    Load,
    LoadFailed,
    Loading,
    Prefilled,
    PrefixNews,
    Ready,
    Shutdown,
    Stats,
    StepEvent,
    ToDaemon,
    ToWorker,
)
from shimpy.scheduler.channel import WorkerChannel
from shimpy.scheduler.exits import ExitKind, WorkerExit, classify_exit
from shimpy.scheduler.mailbox import MAX_UNREAD_BYTES, Mail, Mailbox
from shimpy.units import format_bytes

ENGINE_ARGV = (sys.executable, "-m", "shimpy.engine")

# Without the first each abort runs gdb, which takes seconds and prints pages. The second is
# numpy's: its OpenBLAS starts threads that spin as it is imported, and a worker multiplies no
# matrices by it (0.15 s instead of 0.28 s until a worker is ready, on two cores).
WORKER_ENV = {"GGML_NO_BACKTRACE": "1", "OPENBLAS_NUM_THREADS": "1"}

# libgomp's threads spin between operations, by default so long that one other busy thread on
# the machine slows decoding three- to fourfold. 1000 rounds cost an idle machine nothing
# (146-162 against 140-160 tok/s) and do better on a busy one (54 against 36-46); fewer rounds,
# or OMP_WAIT_POLICY=passive, halve the speed of an idle one. With a GPU in turn the pauses are
# longer, and nothing was measured.
CPU_WORKER_ENV = WORKER_ENV | {"GOMP_SPINCOUNT": "1000"}

# What saving prefixes may take where somebody waits for the memory, in seconds.
URGENT_SAVE_S = 0.25
MAX_LINES = 64
MAX_LINE_CHARS = 500
_READ_BYTES = 64 * 1024

_log = get_logger("worker")


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """How long a worker gets for each thing, in seconds."""

    load_s: float = 600.0
    # Without a word while requests wait for one. A large chunk of a prompt on a slow CPU takes
    # minutes.
    silence_s: float = 900.0
    # After the Shutdown frame, before SIGTERM; after that, before SIGKILL.
    shutdown_s: float = 5.0
    terminate_s: float = 3.0
    # From the end of its channel to the end of the process, and the other way round.
    linger_s: float = 2.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is for: the model that it loads, and whom to tell how that went."""

    name: str
    load: Load
    on_ready: Callable[[Ready], None]
    on_load_failed: Callable[[LoadFailed], None]
    on_stats: Callable[[Stats], None] = lambda _stats: None
    on_prefix: Callable[[PrefixNews], None] = lambda _news: None
    deadlines: Deadlines = msgspec.field(default_factory=Deadlines)


class Worker:
    """One worker process; `run` is its life, everything else may be called meanwhile.

    Until it is given its task it is a spare one, which has everything but a model.
    """

    def __init__(self, *, uses_gpu: bool, argv: Sequence[str] = ENGINE_ARGV) -> None:
        """`uses_gpu` tells whether its model will be on one: its environment differs."""
        self._log = _log
        self.uses_gpu = uses_gpu
        self._argv = argv
        self._task: Task | None = None
        self._given = asyncio.Event()
        self._greeted = False
        self._deadlines = Deadlines()
        self._kills_before: int | None = None
        self._decoder = daemon_decoder()
        self._process: asyncio.subprocess.Process | None = None
        self._channel: WorkerChannel | None = None
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._mailboxes: dict[int, Mailbox] = {}
        self._last_request = 0
        # The reason why it is being stopped, whoever wants it; the first one counts.
        self._ending: WorkerExit | None = None
        self._stop_wanted = asyncio.Event()
        self._shutdown = Shutdown()
        self._loaded = asyncio.Event()
        self._ended: WorkerExit | None = None
        # When it last said something, or was asked for something when it had nothing to do.
        self._heard_s = 0.0
        self.load_fraction = 0.0
        self.stats: Stats | None = None

    # --- used by the scheduler and by leases ------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The process id, once there is a process."""
        return self._process.pid if self._process is not None else None

    def give(self, task: Task) -> None:
        """Let it load a model; once, and before or after it has started."""
        assert self._task is None, "a worker holds one model"
        self._task, self._deadlines = task, task.deadlines
        self._log = _log.bind(worker=task.name)
        self._given.set()
        if self._greeted:
            self.send(task.load)

    @property
    def is_usable(self) -> bool:
        """Whether nothing speaks against giving it a task."""
        return self._task is None and self._ending is None and self._ended is None

    def stop(self, reason: str, *, is_urgent: bool = False) -> None:
        """End it: a Shutdown frame, then SIGTERM, then SIGKILL, each with its deadline.

        Where it is urgent, no more is saved than a moment allows.
        """
        self._shutdown = Shutdown(save_s=URGENT_SAVE_S) if is_urgent else Shutdown()
        self._end(ExitKind.STOPPED, f"was stopped: {reason}")

    def send(self, message: ToWorker) -> None:
        """Send a message; nothing happens when the worker is gone."""
        if self._channel is not None:
            self._channel.write(encode_frame(message))

    async def wait_writable(self) -> None:
        """Wait until the worker has read most of what was sent."""
        # Its end is told through the mailboxes.
        if self._channel is not None:
            await self._channel.wait_writable()

    def open_mailbox(self) -> tuple[int, Mailbox]:
        """Return a new request id and where its answers will arrive."""
        self._last_request += 1
        mailbox = Mailbox()
        if self._ended is not None:
            mailbox.close(_died_error(self._ended))
        else:
            if not self._is_asked:
                self._heard_s = asyncio.get_running_loop().time()
            self._mailboxes[self._last_request] = mailbox
        return self._last_request, mailbox

    @property
    def _is_asked(self) -> bool:
        """Whether a request waits for its answer, or the rest of it."""
        return any(not mailbox.is_answered for mailbox in self._mailboxes.values())

    def close_mailbox(self, request: int) -> bool:
        """Throw away what still comes for a request; returns whether it was open."""
        return self._mailboxes.pop(request, None) is not None

    # --- its life -------------------------------------------------------------------------

    async def run(self) -> WorkerExit:
        """Start the process, let it load, read all it says, and return why it ended.

        On cancellation the process is killed and reaped before this returns.
        """
        end = WorkerExit(kind=ExitKind.FAILED, reason="was given up", returncode=None)
        try:
            end = await self._run_process()
        except OSError as error:
            reason = f"could not be started: {error}"
            end = WorkerExit(kind=ExitKind.FAILED, reason=reason, returncode=None)
        finally:
            self._ended = end
            for mailbox in self._mailboxes.values():
                mailbox.close(_died_error(end))
            self._mailboxes.clear()
        return end

    async def _run_process(self) -> WorkerExit:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = process = await asyncio.create_subprocess_exec(
                    *self._argv,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    # A Ctrl-C in the terminal is for the daemon, which then stops its workers.
                    start_new_session=True,
                    # What the user has set wins.
                    env=(WORKER_ENV if self.uses_gpu else CPU_WORKER_ENV) | os.environ,
                )
        except BaseException:
            ours.close()
            raise
        try:
            self._channel = channel = await WorkerChannel.open(ours, self._on_data)
            await self._live(process, channel)
        finally:
            self._signal(signal.SIGKILL)
            returncode = await process.wait()
            if self._channel is not None:
                self._channel.close()
            else:
                ours.close()
        kills_after = await asyncio.to_thread(count_oom_kills)
        return self._classify(returncode, kills_after)

    async def _live(self, process: asyncio.subprocess.Process, channel: WorkerChannel) -> None:
        """Do all that is to be done while the process runs; return when it has ended."""
        assert process.stdout is not None, "the process was started with a pipe"
        linger_s = self._deadlines.linger_s
        async with asyncio.TaskGroup() as tasks:
            exited = tasks.create_task(process.wait())
            talk = tasks.create_task(self._follow_channel(channel))
            output = tasks.create_task(self._read_output(process.stdout))
            watch = tasks.create_task(self._watch())
            ladder = tasks.create_task(self._climb_stop_ladder(process))
            await asyncio.wait({exited, talk}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({exited}, timeout=linger_s)
            if not exited.done():
                self._end(ExitKind.PROTOCOL, "closed its channel and went on running")
            await exited
            # A child of its own may hold the pipes open: don't wait for their ends for ever.
            await asyncio.wait({talk, output}, timeout=linger_s)
            for task in (talk, output, watch, ladder):
                task.cancel()

    def _classify(self, returncode: int, kills_after: int | None) -> WorkerExit:
        if self._ending is not None:
            kind, reason = self._ending.kind, self._ending.reason
            return WorkerExit(kind=kind, reason=reason, returncode=returncode)
        n_kills = None
        if self._kills_before is not None and kills_after is not None:
            n_kills = kills_after - self._kills_before
        return classify_exit(returncode, last_lines=tuple(self._lines), n_oom_kills=n_kills)

    # --- its end --------------------------------------------------------------------------

    def _end(self, kind: ExitKind, reason: str) -> None:
        if self._ending is None:
            self._ending = WorkerExit(kind=kind, reason=reason, returncode=None)
        self._stop_wanted.set()

    async def _watch(self) -> None:
        await self._given.wait()
        # Not before: those while it was a spare one are no reason of its end.
        self._kills_before = await asyncio.to_thread(count_oom_kills)
        await self._watch_load()
        await self._watch_silence()

    async def _watch_silence(self) -> None:
        """End a worker that hangs: nothing else would, and its requests would wait for ever."""
        loop, limit_s = asyncio.get_running_loop(), self._deadlines.silence_s
        while True:
            silent_s = loop.time() - self._heard_s if self._is_asked else 0.0
            if silent_s >= limit_s:
                reason = f"said nothing for {limit_s:.0f} s with work to do (hang_timeout)"
                self._end(ExitKind.HUNG, reason)
                return
            await asyncio.sleep(limit_s - silent_s)

    async def _watch_load(self) -> None:
        try:
            async with asyncio.timeout(self._deadlines.load_s):
                await self._loaded.wait()
        except TimeoutError:
            limit = f"{self._deadlines.load_s:.0f} s"
            self._end(ExitKind.TOO_SLOW, f"did not load its model in {limit} (load_timeout)")

    async def _climb_stop_ladder(self, process: asyncio.subprocess.Process) -> None:
        """Once a stop is wanted, ask, then insist, then kill."""
        await self._stop_wanted.wait()
        self.send(self._shutdown)
        for wait_s, number in (
            (self._deadlines.shutdown_s, signal.SIGTERM),
            (self._deadlines.terminate_s, signal.SIGKILL),
        ):
            try:
                async with asyncio.timeout(wait_s):
                    await process.wait()
                    return
            except TimeoutError:
                self._log.warning("worker_deaf", pid=process.pid, signal=number.name)
                self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        """Signal the worker and whatever it started; it leads a process group of its own."""
        if self._process is None or self._process.returncode is not None:
            return
        # It may have ended already and be about to be reaped.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    # --- what it says ---------------------------------------------------------------------

    async def _follow_channel(self, channel: WorkerChannel) -> None:
        try:
            await channel.wait_closed()
        except ProtocolError as error:
            self._end(ExitKind.PROTOCOL, f"sent what is no message: {error.message}")
            self._signal(signal.SIGKILL)

    def _on_data(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            self._on_message(message)

    def _on_message(self, message: ToDaemon) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        match message:
            case Events():
                for event in sooner_first(message.events):
                    self._deliver(event)
                if message.stats is not None:
                    self._on_stats(message.stats)
            case Hello():
                self._on_hello(message)
            case Loading():
                self.load_fraction = message.fraction
            case Ready() if self._task is not None:
                self._loaded.set()
                self.load_fraction = 1.0
                self._task.on_ready(message)
            case LoadFailed() if self._task is not None:
                self._loaded.set()
                self._task.on_load_failed(message)
            case Ready() | LoadFailed():
                self._end(ExitKind.PROTOCOL, "told of a model that it was not given")
            case PrefixNews():
                self._on_prefix_news(message)
            case _:
                self._deliver(message)

    def _on_hello(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            reason = (
                f"speaks version {hello.version} of the protocol and the daemon version "
                f"{PROTOCOL_VERSION}: shimpy was upgraded under a running daemon; restart it"
            )
            self._end(ExitKind.PROTOCOL, reason)
            return
        self._greeted = True
        if self._task is not None:
            self.send(self._task.load)

    def _on_stats(self, stats: Stats) -> None:
        self.stats = stats
        if self._task is not None:
            self._task.on_stats(stats)

    def _on_prefix_news(self, news: PrefixNews) -> None:
        log = self._log.warning if news.kind == "discarded" else self._log.info
        log(
            f"prefix_{news.kind}",
            n_tokens=news.n_tokens,
            n_bytes=news.n_bytes,
            took_s=round(news.took_s, 3),
            reason=news.reason,
        )
        if self._task is not None:
            self._task.on_prefix(news)

    def _deliver(self, mail: Mail) -> None:
        """Put mail in its request's box; what comes for a request that has left is dropped."""
        mailbox = self._mailboxes.get(mail.request)
        if mailbox is None:
            return
        mailbox.put(mail)
        if mailbox.is_overfull:
            limit = format_bytes(MAX_UNREAD_BYTES)
            mailbox.close(CapacityError(f"generation was cancelled: {limit} of it were not read"))
            del self._mailboxes[mail.request]
            self.send(Cancel(request=mail.request))

    async def _read_output(self, stream: asyncio.StreamReader) -> None:
        """Keep the last lines that it printed; a pipe that is full would stop it."""
        rest = b""
        while data := await stream.read(_READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-4 * MAX_LINE_CHARS :]
            for line in lines:
                self._on_line(line)
        if rest:
            self._on_line(rest)

    def _on_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()[:MAX_LINE_CHARS]
        if text:
            self._lines.append(text)
            self._log.debug("worker_output", line=text)


def sooner_first(events: list[StepEvent]) -> list[StepEvent]:
    """Return a step's events, those of requests that get their first token before all others.

    Each is written to its client in turn, which takes as long as a tenth of what the daemon adds
    to a first token; between later tokens nobody notices.
    """
    if len(events) < 2:  # noqa: PLR2004 - a single one
        return events
    begun = {event.request for event in events if isinstance(event, Prefilled)}
    if not begun:
        return events
    return sorted(events, key=lambda event: event.request not in begun)


def count_oom_kills() -> int | None:
    """Return the kernel's out-of-memory kills since boot, or None where it doesn't tell."""
    try:
        # Counts the kills for a cgroup's limit as well as those for the whole machine's.
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return None


def _died_error(end: WorkerExit) -> WorkerDiedError:
    return WorkerDiedError(f"the model's worker {end.reason}")
