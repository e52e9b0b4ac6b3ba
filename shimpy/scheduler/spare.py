"""One worker process that has everything but a model, so that a load needs no start of Python.

    (none) --wanted, and a quiet moment--> ready --take--> a resident's worker --> (none)

It begins to be wanted when the daemon has looked around, and again after each load. Starting it
takes a core for a fifth of a second, so it waits until nothing runs, but not for ever; nor where
a load is planned, which takes as long: the worker starts meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shimpy.logs import get_logger
from shimpy.scheduler.clock import Clock, TimerHandle
from shimpy.scheduler.worker import Worker

# Of quiet, before it is started; the answers of a chat come in such intervals.
QUIET_S = 1.0
# It is wanted for no longer than this: somebody is always busy.
PATIENCE_S = 15.0

_log = get_logger("scheduler")


class SpareWorker:
    """Owns the spare process, if there is one; `run` is given it to await its end."""

    def __init__(
        self,
        *,
        argv: Sequence[str],
        clock: Clock,
        run: Callable[[Worker], None],
        is_enabled: bool,
    ) -> None:
        self._argv = argv
        self._clock = clock
        self._run = run
        self._is_enabled = is_enabled
        self._is_closed = False
        self._uses_gpu = False
        self._wanted_since_s: float | None = None
        self._timer: TimerHandle | None = None
        # The one that is ready; those that are on their way out.
        self._worker: Worker | None = None
        self._leaving: set[Worker] = set()

    @property
    def pid(self) -> int | None:
        """The process id, once there is a process."""
        return self._worker.pid if self._worker is not None else None

    @property
    def is_there(self) -> bool:
        """Whether there is one, or one is just starting."""
        return self._worker is not None

    @property
    def is_gone(self) -> bool:
        """Whether no process is left that is nobody's."""
        return self._worker is None and not self._leaving

    def want(self, *, uses_gpu: bool) -> None:
        """Have one soon, for a model that is, or is not, on a GPU; `on_change` says when."""
        if self._worker is not None and self._worker.uses_gpu != uses_gpu:
            self._dismiss("another kind is wanted")
        self._uses_gpu = uses_gpu
        if self._worker is None:
            self._wanted_since_s = self._clock.now()

    def hurry(self) -> None:
        """Start one now if there is none: a load that is being planned will take it."""
        if self._is_enabled and self._worker is None:
            self._disarm()
            self._start()

    def take(self, *, uses_gpu: bool) -> Worker | None:
        """Hand over the spare worker, if there is one of that kind; another is wanted then."""
        worker = self._worker
        if worker is not None and worker.is_usable and worker.uses_gpu == uses_gpu:
            self._worker = None
        else:
            worker = None
        self.want(uses_gpu=uses_gpu)
        return worker

    def enable(self, *, is_enabled: bool) -> None:
        """Begin or cease to keep one."""
        if is_enabled == self._is_enabled or self._is_closed:
            return
        self._is_enabled = is_enabled
        if is_enabled:
            self.want(uses_gpu=self._uses_gpu)
        else:
            self._dismiss("none is wanted")

    def close(self) -> None:
        """Stop it, and start no other."""
        self.enable(is_enabled=False)
        self._is_closed = True
        self._disarm()

    def on_change(self, *, is_quiet: bool) -> None:
        """Start one when it has been quiet for a while; call it whenever that may have changed."""
        self._disarm()
        if not self._is_enabled or self._wanted_since_s is None:
            return
        now = self._clock.now()
        at_s = self._wanted_since_s + PATIENCE_S
        if at_s <= now:
            self._start()
            return
        if is_quiet:
            at_s = min(at_s, now + QUIET_S)
        self._timer = self._clock.call_at(at_s, self._start)

    def on_exit(self, worker: Worker) -> None:
        """Forget one that has ended; one that died by itself is not replaced before a load."""
        self._leaving.discard(worker)
        if worker is self._worker:
            self._worker = None

    def _start(self) -> None:
        self._timer = None
        self._wanted_since_s = None
        self._worker = Worker(uses_gpu=self._uses_gpu, argv=self._argv)
        _log.debug("spare_worker", uses_gpu=self._uses_gpu)
        self._run(self._worker)

    def _dismiss(self, reason: str) -> None:
        if self._worker is not None:
            self._worker.stop(reason)
            self._leaving.add(self._worker)
            self._worker = None

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
