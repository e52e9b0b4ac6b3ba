"""The worker processes: started or taken from the spare one, and followed to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from shimpy.logs import get_logger
from shimpy.scheduler.clock import Clock
from shimpy.scheduler.exits import ExitKind, WorkerExit
from shimpy.scheduler.spare import SpareWorker
from shimpy.scheduler.states import WorkerId
from shimpy.scheduler.worker import Task, Worker

_log = get_logger("scheduler")


class Crew:
    """Owns all workers: those that have a model by their ids, and the spare one."""

    def __init__(
        self,
        *,
        argv: Sequence[str],
        clock: Clock,
        spawn: Callable[[Coroutine[None, None, None]], object],
        on_exit: Callable[[WorkerId, WorkerExit], None],
        keeps_spare: bool,
    ) -> None:
        """`spawn` starts a task; `on_exit` hears of the end of each worker that had a model."""
        self._argv = argv
        self._spawn = spawn
        self._on_exit = on_exit
        self._workers: dict[WorkerId, Worker] = {}
        self._one_has_gone = asyncio.Event()
        self.spare = SpareWorker(argv=argv, clock=clock, run=self._run, is_enabled=keeps_spare)

    def __getitem__(self, worker_id: WorkerId) -> Worker:
        """Return a worker that has not been reaped yet."""
        return self._workers[worker_id]

    def start(self, worker_id: WorkerId, task: Task) -> None:
        """Give a task to the spare worker, if it is of the right kind, or to a new one."""
        uses_gpu = bool(task.load.devices)
        worker = self.spare.take(uses_gpu=uses_gpu)
        if worker is None:
            worker = Worker(uses_gpu=uses_gpu, argv=self._argv)
            self._run(worker)
        self._workers[worker_id] = worker
        worker.give(task)

    async def wait_exit(self) -> None:
        """Wait until one more worker has gone."""
        self._one_has_gone.clear()
        await self._one_has_gone.wait()

    async def wait_none(self) -> None:
        """Wait until no worker is left."""
        while self._workers or not self.spare.is_gone:
            await self.wait_exit()

    def _run(self, worker: Worker) -> None:
        self._spawn(self._follow(worker))

    async def _follow(self, worker: Worker) -> None:
        try:
            end = await self._end_of(worker)
            worker_id = self._id_of(worker)
            name = "spare" if worker_id is None else worker_id
            _log.info("worker_exit", worker=name, kind=end.kind.value, reason=end.reason)
            if worker_id is not None:
                self._on_exit(worker_id, end)
        finally:
            # Cancelled, too: somebody waits until no worker is left.
            worker_id = self._id_of(worker)
            if worker_id is not None:
                del self._workers[worker_id]
            self.spare.on_exit(worker)
            self._one_has_gone.set()

    async def _end_of(self, worker: Worker) -> WorkerExit:
        try:
            return await worker.run()
        except Exception as error:  # noqa: BLE001 - a task's boundary: one worker is lost
            _log.exception("worker_lost", pid=worker.pid)
            reason = f"was lost to a fault in shimpy: {error}"
            return WorkerExit(kind=ExitKind.FAILED, reason=reason, returncode=None)

    def _id_of(self, worker: Worker) -> WorkerId | None:
        """Return the id that a worker was started under; None: it never had a task."""
        return next((key for key, other in self._workers.items() if other is worker), None)
