"""The pulls that run: each in a thread, shared by all who ask for the same model.

    begun by the first who asks ─▶ runs ─▶ ended: installed, failed, or stopped
                                     └─ the last who asked has left: stopped, what came is kept

Events are kept by what they are about, the newest of each: whoever joins late is told all that
still matters, and a slow reader holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

import msgspec

from shimpy.errors import QueueFullError, ShimpyError, StoppingError
from shimpy.logs import get_logger
from shimpy.registry.attempts import Stop, StoppedError
from shimpy.registry.downloads import Progress
from shimpy.registry.manifest import Manifest
from shimpy.registry.pull import Event, Judge, Planned, Puller, Step
from shimpy.registry.reference import Reference

# More at once would only share the line, and a burst of them is nobody's wish.
MAX_RUNNING: Final = 4
MAX_WAITING: Final = 32
# A thread that reads from a dead server ends with its time limit; the daemon waits less.
_FAREWELL_S: Final = 3.0

_log = get_logger("pulls")

# How a pull is told from others: what it was asked for, and whether by force.
_Key = tuple[str, bool]


class _Pull(msgspec.Struct, eq=False):
    """One pull and those who follow it."""

    key: _Key
    stop: Stop = msgspec.field(default_factory=Stop)
    n_followers: int = 0
    manifest: Manifest | None = None
    error: ShimpyError | None = None
    ended: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    # By what they are about, with the number under which they were told.
    _events: dict[str, tuple[int, Event]] = msgspec.field(default_factory=dict)
    _n_told: int = 0
    _news: asyncio.Event = msgspec.field(default_factory=asyncio.Event)

    def tell(self, event: Event) -> None:
        """Take an event; the next of its kind replaces it."""
        self._n_told += 1
        self._events[_subject(event)] = (self._n_told, event)
        self._wake()

    def end(self) -> None:
        """Let followers know that nothing more will come."""
        self.ended.set()
        self._wake()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield what has been told and what will be, until the end."""
        n_seen = 0
        while True:
            news, is_over = self._news, self.ended.is_set()
            for number, event in sorted(self._events.values(), key=lambda told: told[0]):
                if number > n_seen:
                    n_seen = number
                    yield event
            if is_over:
                return
            await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Pulls:
    """All pulls; it belongs to the event loop's thread."""

    def __init__(
        self,
        puller: Puller,
        *,
        tasks: asyncio.TaskGroup,
        make_judge: Callable[[], Awaitable[Judge]],
        on_installed: Callable[[Manifest], Awaitable[None]],
    ) -> None:
        """Run pulls as tasks of `tasks`.

        Args:
            puller: does the work.
            tasks: owns them.
            make_judge: asked once for each pull.
            on_installed: told of each model before its followers are.
        """
        self._puller = puller
        self._tasks = tasks
        self._make_judge = make_judge
        self._on_installed = on_installed
        self._pulls: dict[_Key, _Pull] = {}
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._is_closed = False

    async def follow(
        self, reference: Reference, *, force: bool = False
    ) -> AsyncGenerator[Event | Manifest, None]:
        """Yield a pull's events and at last its manifest; join it if it runs already.

        When the last follower closes its generator early, the pull stops; what came is kept.

        Raises:
            ShimpyError: it failed, or the daemon is stopping; says why.
        """
        key = (str(reference), force)
        pull = await self._join(key, reference)
        pull.n_followers += 1
        try:
            async with contextlib.aclosing(pull.events()) as events:
                async for event in events:
                    yield event
        finally:
            pull.n_followers -= 1
            if pull.n_followers == 0:
                pull.stop.set()
        if pull.error is not None:
            raise pull.error
        assert pull.manifest is not None, "a pull ends with a manifest or an error"
        yield pull.manifest

    async def close(self) -> None:
        """Stop all pulls and take no more; returns when they have ended, or soon after."""
        self._is_closed = True
        running = list(self._pulls.values())
        for pull in running:
            pull.stop.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                for pull in running:
                    await pull.ended.wait()
        for pull in running:
            if pull.task is not None:
                pull.task.cancel()

    async def _join(self, key: _Key, reference: Reference) -> _Pull:
        while True:
            pull = self._pulls.get(key)
            if pull is None:
                break
            if not pull.stop.is_set:
                return pull
            # Everyone had left it; it ends before it is begun again.
            await pull.ended.wait()
        if self._is_closed:
            raise StoppingError
        if len(self._pulls) >= MAX_RUNNING + MAX_WAITING:
            raise QueueFullError(f"{len(self._pulls)} pulls run or wait already; try again later")
        pull = self._pulls[key] = _Pull(key)
        pull.task = self._tasks.create_task(self._run(pull, reference))
        return pull

    async def _run(self, pull: _Pull, reference: Reference) -> None:
        try:
            if self._slots.locked():
                pull.tell(Step(status=f"waiting for one of {MAX_RUNNING} pulls to end"))
            async with self._slots:
                pull.stop.check()
                manifest = await self._work(pull, reference)
            await self._on_installed(manifest)
            pull.manifest = manifest
            _log.info("pulled", model=str(manifest.model_name), reference=str(reference))
        except StoppedError:
            pull.error = StoppingError(
                f"the pull of {reference} was stopped; what came is kept, and the next pull goes "
                "on from there"
            )
            _log.info("pull_stopped", reference=str(reference))
        except ShimpyError as error:
            pull.error = error
            _log.warning("pull_failed", reference=str(reference), error=error.message)
        except Exception as error:  # noqa: BLE001 - the boundary of a task
            pull.error = ShimpyError(f"the pull of {reference} failed for a reason in the log")
            _log.error("pull_broken", reference=str(reference), exc_info=error)
        finally:
            if pull.manifest is None and pull.error is None:
                pull.error = StoppingError()
            del self._pulls[pull.key]
            pull.end()

    async def _work(self, pull: _Pull, reference: Reference) -> Manifest:
        """Run the puller in a thread."""
        judge = await self._make_judge()
        loop = asyncio.get_running_loop()

        def report(event: Event) -> None:
            loop.call_soon_threadsafe(pull.tell, event)

        def work() -> Manifest:
            return self._puller.pull(
                reference, judge=judge, force=pull.key[1], report=report, stop=pull.stop
            )

        try:
            return await _in_thread(work, name=f"pull {reference}")
        except asyncio.CancelledError:
            pull.stop.set()
            raise


async def _in_thread(work: Callable[[], Manifest], *, name: str) -> Manifest:
    """Return what `work` returns, run in a thread that does not keep the process alive.

    The loop's own threads are few, and for short work.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Manifest] = loop.create_future()

    def settle(result: Manifest | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            assert result is not None
            done.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - handed to the loop as it is
            failure = error
        # A daemon that has gone on without us needs no answer.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=name[:60], daemon=True).start()
    return await done


def _subject(event: Event) -> str:
    match event:
        case Step(status=status):
            return f"step {status}"
        case Planned():
            return "plan"
        case Progress(file=file, digest=digest):
            return f"file {digest or file}"
