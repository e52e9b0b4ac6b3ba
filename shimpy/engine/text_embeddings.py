"""Embeddings of a model that was loaded to generate: its state after a text's last token.

Each text runs through the batcher as a prompt that nothing is generated for, beside whatever
else runs. Then its last token is decoded once more, alone, for the state: llama.cpp gives
states only of batches all of whose tokens are outputs, and there is room for one a slot.

Source: Ollama does the same for models whose file names no pooling (runner/llamarunner).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from shimpy.engine.backend import Backend, Chunk
from shimpy.engine.batcher import Batcher
from shimpy.engine.intake import Inputs
from shimpy.engine.sequence import Sequence
from shimpy.errors import WorkerError
from shimpy.protocol.messages import Embedded

_FLOAT_BYTES = 4


class _Job(msgspec.Struct, eq=False):
    work: Inputs
    # By the index of their text.
    vectors: dict[int, bytes] = msgspec.field(default_factory=dict)
    n_submitted: int = 0

    @property
    def request(self) -> int:
        return self.work.embed.request


class TextEmbeddings:
    """Requests for embeddings, first come, first served; at most a text for each slot runs."""

    def __init__(self, backend: Backend, batcher: Batcher) -> None:
        self._backend = backend
        self._batcher = batcher
        self._jobs: deque[_Job] = deque()
        # The texts that the batcher has, each with its job and its index there.
        self._running: dict[Sequence, tuple[_Job, int]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, work: Inputs) -> None:
        """Queue a request of one input or more."""
        self._jobs.append(_Job(work))
        self._submit()

    def cancel(self, request: int) -> bool:
        """Forget a request; False: it is not here."""
        for job in self._jobs:
            if job.request == request:
                self._close(job)
                return True
        return False

    def drop(self, sequence: Sequence) -> int | None:
        """Forget the request that a sequence is of, and return it; None: it has gone before."""
        if sequence not in self._running:
            return None
        job, _ = self._running[sequence]
        self._close(job)
        return job.request

    def alike(self, sequences: Iterable[Sequence]) -> list[list[Sequence]]:
        """Return the sequences in groups that `finish` takes together."""
        groups: dict[bool, list[Sequence]] = {}
        for sequence in sequences:
            job, _ = self._running[sequence]
            groups.setdefault(job.work.embed.normalize, []).append(sequence)
        return list(groups.values())

    def finish(self, sequences: list[Sequence]) -> list[Embedded]:
        """Take texts that are decoded to their end; return the requests that are done with them.

        What is in the logits is overwritten.

        Raises:
            WorkerError: llama.cpp refused; the sequences are to be dropped.
        """
        jobs = list(dict.fromkeys(self._running[sequence][0] for sequence in sequences))
        chunks = [self._last_token(sequence) for sequence in sequences]
        data = self._backend.embed_last(chunks, normalize=jobs[0].work.embed.normalize)
        n_bytes = self._backend.n_embd * _FLOAT_BYTES
        for row, sequence in enumerate(sequences):
            job, index = self._running.pop(sequence)
            job.vectors[index] = data[row * n_bytes : (row + 1) * n_bytes]
            # Its KV is worth little: no prompt goes on from a text that was embedded.
            self._batcher.finish(sequence, keep_kv=False)
        done = [job for job in jobs if len(job.vectors) == len(job.work.ids)]
        answers = [self._answer(job) for job in done]
        for job in done:
            self._jobs.remove(job)
        self._submit()
        return answers

    def _submit(self) -> None:
        """Give the batcher texts, so many that others get their turn between them."""
        for job in self._jobs:
            while job.n_submitted < len(job.work.ids):
                if len(self._running) >= self._backend.n_slots:
                    return
                index = job.n_submitted
                tokens = job.work.ids[index]
                sequence = Sequence(request=job.request, tokens=tokens, n_predict=1)
                self._running[sequence] = (job, index)
                job.n_submitted += 1
                self._batcher.submit(sequence)

    def _last_token(self, sequence: Sequence) -> Chunk:
        """Take the last token out of the KV cache and return it."""
        slot = sequence.slot
        assert slot is not None, "a sequence that was decoded has a slot"
        start = len(sequence.tokens) - 1
        if not self._backend.kv_remove(slot.id, start, -1):
            raise WorkerError("llama.cpp does not let go of a text's last token")
        return Chunk(slot.id, start, sequence.tokens[start:], wants_logits=True)

    def _answer(self, job: _Job) -> Embedded:
        vectors = [job.vectors[index] for index in range(len(job.work.ids))]
        n_tokens = sum(map(len, job.work.ids))
        return Embedded(job.request, self._backend.n_embd, b"".join(vectors), n_tokens)

    def _close(self, job: _Job) -> None:
        self._jobs.remove(job)
        for sequence in [one for one, (owner, _) in self._running.items() if owner is job]:
            del self._running[sequence]
            self._batcher.finish(sequence, keep_kv=False)
        self._submit()
