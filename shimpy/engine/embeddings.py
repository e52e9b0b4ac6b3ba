"""The queue of inputs to embed: filled into batches across requests, answered in order."""

from __future__ import annotations

from collections import deque

import msgspec

from shimpy.engine.backend import Backend
from shimpy.engine.intake import Inputs
from shimpy.errors import ShimpyError
from shimpy.protocol.messages import Embedded, Failed

_FLOAT_BYTES = 4


class _Job(msgspec.Struct, eq=False):
    work: Inputs
    vectors: list[bytes] = msgspec.field(default_factory=list)

    @property
    def request(self) -> int:
        return self.work.embed.request


class Embeddings:
    """Requests for embeddings, first come, first served."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._jobs: deque[_Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, work: Inputs) -> None:
        """Queue a request of one input or more."""
        self._jobs.append(_Job(work))

    def cancel(self, request: int) -> bool:
        """Forget a request; False: it is not here."""
        for job in self._jobs:
            if job.request == request:
                self._jobs.remove(job)
                return True
        return False

    def step(self) -> list[Embedded | Failed]:
        """Embed a batch of the inputs that are next; return what is finished with it."""
        normalize = self._jobs[0].work.embed.normalize
        batch = self._next_batch(normalize=normalize)
        jobs = list(dict.fromkeys(job for job, _ in batch))
        try:
            data = self._backend.embed([ids for _, ids in batch], normalize=normalize)
        except ShimpyError as error:
            return [
                self._close(job, Failed(job.request, error.code, error.message)) for job in jobs
            ]
        n_bytes = self._backend.n_embd * _FLOAT_BYTES
        for index, (job, _) in enumerate(batch):
            job.vectors.append(data[index * n_bytes : (index + 1) * n_bytes])
        return [
            self._close(job, self._answer(job))
            for job in jobs
            if len(job.vectors) == len(job.work.ids)
        ]

    def _next_batch(self, *, normalize: bool) -> list[tuple[_Job, list[int]]]:
        """Return at least one input, and more up to n_batch tokens, with their jobs."""
        batch: list[tuple[_Job, list[int]]] = []
        n_left = self._backend.n_batch
        for job in self._jobs:
            if job.work.embed.normalize is not normalize:
                break
            for ids in job.work.ids[len(job.vectors) :]:
                if batch and len(ids) > n_left:
                    return batch
                batch.append((job, ids))
                n_left -= len(ids)
        return batch

    def _answer(self, job: _Job) -> Embedded:
        n_tokens = sum(map(len, job.work.ids))
        return Embedded(job.request, self._backend.n_embd, b"".join(job.vectors), n_tokens)

    def _close(self, job: _Job, answer: Embedded | Failed) -> Embedded | Failed:
        self._jobs.remove(job)
        return answer
