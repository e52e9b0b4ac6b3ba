"""The engine's loop: drain, next_batch, decode, sample, send; nothing else happens in a step.

One thread owns all of it. What the reader thread takes in waits in the inbox; the loop
blocks on that only when it has nothing to run.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Final, assert_never

from shimpy.engine.admission import Restore
from shimpy.engine.backend import Backend, DecodeStatus, n_ctx_seq
from shimpy.engine.batcher import Batch, Batcher
from shimpy.engine.embeddings import Embeddings
from shimpy.engine.generation import Generation, Pieces
from shimpy.engine.intake import Inbox, Inputs, Prompted, Work
from shimpy.engine.outbox import Outbox
from shimpy.engine.parked import ParkedPrefixes
from shimpy.engine.parker import Park
from shimpy.engine.prefix_store import PrefixStore
from shimpy.engine.sequence import KvCopy, KvExchange, KvOp, KvRemove, KvShift, Sequence
from shimpy.engine.stretch import run_on
from shimpy.engine.text_embeddings import TextEmbeddings
from shimpy.engine.untouched import Untouched
from shimpy.errors import ProtocolError, QueueFullError, ShimpyError, WorkerError
from shimpy.protocol.messages import (
    Cancel,
    Done,
    Failed,
    FinishReason,
    LimitParked,
    SetThreads,
    Shutdown,
    Stats,
    ToDaemon,
)

# More than the daemon lets wait for one model.
MAX_WAITING: Final = 4096
STATS_INTERVAL_S: Final = 1.0


class Engine:
    """Serves the requests in an inbox with one loaded model."""

    def __init__(
        self,
        backend: Backend,
        *,
        inbox: Inbox,
        send: Callable[[ToDaemon], None],
        clock: Callable[[], float],
        n_ubatch: int = 512,
        embeds: bool = False,
        prefixes: PrefixStore | None = None,
        parked: ParkedPrefixes | None = None,
        attends_idle: bool = False,
        uses_gpu: bool = False,
    ) -> None:
        """Start idle; no batch is longer than the backend's `n_ubatch`.

        llama.cpp would only cut it up, and a cancel or a newcomer would wait for all of it.
        `embeds`: the model was loaded for embeddings. `prefixes`: where those of prompts
        outlive the process. `parked`: where those of idle slots wait in RAM; both have the same
        list of them. `attends_idle`: what idle slots hold slows down the others. `uses_gpu`:
        layers, or their experts, are computed by one.
        """
        store = prefixes or parked
        self._backend = backend
        self._inbox = inbox
        self._send = send
        self._clock = clock
        self._batcher = Batcher(
            n_slots=backend.n_slots,
            n_ctx=backend.n_ctx * (1 if backend.kv_unified else backend.n_slots),
            n_ctx_seq=n_ctx_seq(backend),
            n_batch=min(backend.n_batch, max(n_ubatch, backend.n_slots)),
            can_split=backend.can_split,
            can_shift=backend.can_shift,
            kv_unified=backend.kv_unified,
            saved=None if store is None else store.saved,
            attends_idle=attends_idle,
            can_park=parked is not None,
            uses_gpu=uses_gpu,
        )
        self._prefixes = prefixes
        self._parked = parked
        self._embeddings = Embeddings(backend)
        self._texts = TextEmbeddings(backend, self._batcher)
        self._embeds = embeds
        self._generations: dict[int, Generation] = {}
        self._plain = Pieces(backend, special=False)
        self._special = Pieces(backend, special=True)
        self._outbox = Outbox(send)
        self._untouched = Untouched(backend.untouched_bytes)
        self._stats = Stats(0, 0, 0)
        self._stats_sent_s = -STATS_INTERVAL_S
        # When the last batch was computed.
        self._decoded_s = 0.0
        self._is_stopping = False
        self._save_s = 0.0

    def run(self) -> None:
        """Step until Shutdown; running requests then end as cancelled, their prefixes saved."""
        while not self._is_stopping:
            if not (self._generations or self._embeddings or self._texts):
                self._wait()
            self.step(goes_on=True)
        for generation in list(self._generations.values()):
            self._end(generation, "cancelled")
        self._flush()
        self._save()

    def step(self, *, goes_on: bool = False) -> None:
        """Take in what has arrived, run one batch, and send what it gave.

        `goes_on`: and as many more like it as its news may wait for.
        """
        # empty() takes the lock, in each step.
        while self._inbox.queue:
            self._on_work(self._inbox.get_nowait())
        if self._is_stopping:
            return
        now = self._clock()
        todo = self._batcher.next_batch(now)
        if isinstance(todo, Batch):
            if todo.n_prefill:
                # It may take long.
                self._outbox.send(now)
            self._run(todo, now, goes_on=goes_on)
            self._flush(is_halfway=todo.part == "first")
            return
        self._outbox.send(now)
        match todo:
            case Restore() as restore:
                self._restore(restore)
            case Park() as park:
                self._park(park)
            case None if self._embeddings:
                for answer in self._embeddings.step():
                    self._send(answer)
        self._flush()

    # --- in ---

    def _wait(self) -> None:
        """Block until something arrives, or until the last change of Stats may be sent.

        In between copy what idles, a slot at a time: whoever comes then waits for no more.
        """
        if (quiet_s := self._batcher.quiet_s) is not None:
            left_s = max(0.0, self._decoded_s + quiet_s - self._clock())
            with contextlib.suppress(queue.Empty):
                self._on_work(self._inbox.get(timeout=left_s))
                return
            if (park := self._batcher.next_copy()) is not None:
                self._park(park)
                return
        timeout = None
        if self._measure() != self._stats:
            timeout = max(0.0, self._stats_sent_s + STATS_INTERVAL_S - self._clock())
        with contextlib.suppress(queue.Empty):
            self._on_work(self._inbox.get(timeout=timeout))

    def _on_work(self, work: Work) -> None:
        match work:
            case Prompted():
                self._accept(work)
            case Inputs():
                (self._embeddings if self._embeds else self._texts).add(work)
            case Cancel():
                self._cancel(work.request)
            case SetThreads():
                self._backend.set_threads(work.n_threads)
            case LimitParked():
                self._limit_parked(work.n_bytes)
            case Shutdown():
                self._is_stopping = True
                self._save_s = work.save_s
            case _:
                assert_never(work)

    def _accept(self, work: Prompted) -> None:
        submit = work.submit
        if submit.request in self._generations:
            raise ProtocolError(f"request {submit.request} is running already")
        if self._batcher.n_waiting >= MAX_WAITING:
            error = QueueFullError(f"{MAX_WAITING} requests wait for the model already")
            self._refuse(submit.request, error)
            return
        try:
            sampler = self._backend.make_sampler(submit.sampling, work.ids)
        except Exception as error:  # noqa: BLE001 - one request's boundary
            self._refuse(submit.request, error)
            return
        pieces = self._special if submit.show_special else self._plain
        generation = Generation(work, self._backend, sampler, pieces)
        self._generations[submit.request] = generation
        self._batcher.submit(generation.sequence)

    def _cancel(self, request: int) -> None:
        """End a request; one that has ended already has had its answer."""
        generation = self._generations.get(request)
        if generation is not None:
            self._end(generation, "cancelled")
        elif self._embeddings.cancel(request) or self._texts.cancel(request):
            self._outbox.add(Done(request, "cancelled", 0, 0, 0, prefill_s=0.0, decode_s=0.0))

    # --- one batch ---

    def _run(self, batch: Batch, started_s: float, *, goes_on: bool) -> None:
        if batch.ops and not self._prepare(batch.ops):
            return
        try:
            status = self._backend.decode(batch.chunks)
        except Exception as error:  # noqa: BLE001 - one batch's boundary
            self._on_fault(batch, error)
            return
        if status != DecodeStatus.OK:
            self._on_fault(batch, status)
            return
        self._decoded_s = now = self._clock()
        self._batcher.on_decoded(batch)
        self._sample(batch, now)
        self._batcher.on_timed(batch, now - started_s)
        goes_on = goes_on and not self._inbox.queue and self._outbox.may_wait(now)
        if goes_on and (n_most := self._batcher.n_repeats(batch)):
            self._run_on(batch, n_most)

    def _run_on(self, batch: Batch, n_most: int) -> None:
        """Repeat a step until something is to be sent, or to be taken in."""
        stretch = run_on(
            self._backend,
            [self._generations[sequence.request] for sequence in batch.sequences],
            n_most,
            decoded_s=self._decoded_s,
            due_s=self._outbox.due_s,
            arrived=self._inbox.queue,
            clock=self._clock,
        )
        self._outbox.on_step(stretch.before_s)
        self._decoded_s = stretch.decoded_s
        self._batcher.on_repeated(batch, stretch.drawn, stretch.n_steps, stretch.took_s)
        for generation, error in stretch.ended:
            if error is None:
                self._end(generation, "stop")
            else:
                self._fail(generation, error)
        if stretch.fault is not None:
            self._on_fault(batch, stretch.fault)

    def _on_fault(self, batch: Batch, fault: int | Exception) -> None:
        """Do what a batch's status asks for, or fail its requests."""
        match fault:
            case Exception():
                self._fail_batch(batch, fault)
            case DecodeStatus.KV_FULL:
                self._make_room()
            case _:
                error = WorkerError("llama.cpp gave up in the middle of a batch")
                self._fail_batch(batch, error)

    def _restore(self, restore: Restore) -> None:
        store = self._parked if restore.prefix.is_parked else self._prefixes
        assert store is not None, "only what a store knows is restored"
        if self._prepare(restore.ops) and store.restore(restore.prefix, restore.slot):
            self._batcher.on_restored(restore)

    def _park(self, park: Park) -> None:
        assert self._parked is not None, "nothing is parked without a place for it"
        started_s = self._clock()
        if not self._prepare(park.ops):
            return
        for prefix in park.covers:
            self._parked.discard(prefix)
        is_kept = self._parked.park(park.slot, park.tokens)
        self._batcher.on_parked(park, self._clock() - started_s, is_kept=is_kept)

    def _limit_parked(self, n_bytes: int) -> None:
        """Give up what is parked over a new limit, and have that told at the end of the step."""
        if self._parked is not None:
            self._parked.set_limit(n_bytes)
            self._stats_sent_s = -STATS_INTERVAL_S

    def _save(self) -> None:
        """Save what the slots hold, now that nothing runs."""
        if self._prefixes is None or self._texts:
            return
        ops, saves = self._batcher.plan_saves()
        if all(map(self._apply, ops)):
            self._prefixes.save(saves, self._save_s, self._parked)

    def _prepare(self, ops: list[KvOp]) -> bool:
        """Do to the KV cache what comes before a batch, a restore or a copy; False: not now."""
        if all(map(self._apply, ops)):
            return True
        self._batcher.on_kv_refused()
        return False

    def _apply(self, op: KvOp) -> bool:
        match op:
            case KvRemove():
                return self._backend.kv_remove(op.slot, op.start, op.end)
            case KvCopy():
                return self._backend.kv_copy(op.source, op.target, op.n)
            case KvExchange():
                return self._backend.kv_exchange(op.first, op.second)
            case KvShift():
                self._backend.kv_shift(op.slot, op.start, op.end, op.delta)
                return True
            case _:
                assert_never(op)

    def _make_room(self) -> None:
        sequence = self._batcher.on_kv_full()
        if sequence is not None:
            error = WorkerError(
                f"the KV cache of {self._backend.n_ctx} tokens is full at "
                f"{len(sequence.tokens)} tokens of this request alone"
            )
            self._fail_sequence(sequence, error)

    def _sample(self, batch: Batch, now: float) -> None:
        """Draw a token for each output; who waits for a first one is told before the others."""
        texts: list[Sequence] = []
        rows: Iterable[tuple[int, Sequence]] = enumerate(batch.sequences)
        if batch.n_prefill:
            outputs = zip(batch.sequences, batch.chunks, strict=True)
            wanted = list(enumerate(one for one, chunk in outputs if chunk.wants_logits))
            rows = [(row, one) for row, one in wanted if one.n_generated]
            for row, sequence in wanted:
                if not sequence.n_generated:
                    self._draw(row, sequence, texts, now)
            self._outbox.send(now)
        for row, sequence in rows:
            self._draw(row, sequence, texts, now)
        if texts:
            # Last, as it overwrites the logits.
            for group in self._texts.alike(texts):
                self._embed(group)

    def _draw(self, row: int, sequence: Sequence, texts: list[Sequence], now: float) -> None:
        generation = self._generations.get(sequence.request)
        if generation is None:
            # Of a text to embed.
            texts.append(sequence)
            return
        try:
            self._advance(generation, row, now)
        except Exception as error:  # noqa: BLE001 - one request's boundary
            self._fail(generation, error)

    def _embed(self, texts: list[Sequence]) -> None:
        try:
            answers = self._texts.finish(texts)
        except Exception as error:  # noqa: BLE001 - one batch's boundary
            for sequence in texts:
                self._fail_sequence(sequence, error)
            return
        for answer in answers:
            self._send(answer)

    def _advance(self, generation: Generation, row: int, now: float) -> None:
        """Sample a request's next token and say what is certain of its text."""
        sequence = generation.sequence
        if not sequence.n_generated and (prefilled := generation.on_prefilled(now)) is not None:
            self._outbox.add(prefilled)
            if sequence.n_predict == 0:
                self._end(generation, "length")
                return
        token = generation.draw(row)
        self._outbox.add_text(generation)
        goes_on = token is not None and self._batcher.on_token(sequence, token)
        if generation.is_over:
            self._end(generation, "stop")
        elif not goes_on:
            generation.finish()
            self._end(generation, "length")

    # --- out ---

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        self._outbox.add(generation.done(reason, self._clock()))
        self._close(generation)

    def _fail(self, generation: Generation, error: Exception, *, keep_kv: bool = True) -> None:
        self._refuse(generation.request, error)
        self._close(generation, keep_kv=keep_kv)

    def _fail_batch(self, batch: Batch, error: Exception) -> None:
        """Fail the requests of a batch; what it left in their slots is not to be trusted."""
        for sequence in batch.sequences:
            self._fail_sequence(sequence, error)

    def _fail_sequence(self, sequence: Sequence, error: Exception) -> None:
        generation = self._generations.get(sequence.request)
        if generation is not None:
            self._fail(generation, error, keep_kv=False)
        elif (request := self._texts.drop(sequence)) is not None:
            self._refuse(request, error)

    def _refuse(self, request: int, error: Exception) -> None:
        if isinstance(error, ShimpyError):
            self._outbox.add(Failed(request, error.code, error.message))
            return
        traceback.print_exception(error, file=sys.stderr)
        message = f"the worker failed on this request: {type(error).__name__}: {error}"
        self._outbox.add(Failed(request, WorkerError.code, message))

    def _close(self, generation: Generation, *, keep_kv: bool = True) -> None:
        del self._generations[generation.request]
        self._batcher.finish(generation.sequence, keep_kv=keep_kv)
        generation.sampler.close()

    def _flush(self, *, is_halfway: bool = False) -> None:
        now = self._clock()
        if (
            now - self._stats_sent_s >= STATS_INTERVAL_S
            and (stats := self._measure()) != self._stats
        ):
            self._outbox.add_stats(stats)
            self._stats, self._stats_sent_s = stats, now
        self._outbox.flush(now, is_halfway=is_halfway)
        if not self._generations:
            # Nobody has news with which it would go.
            self._outbox.send(now)

    def _measure(self) -> Stats:
        batcher = self._batcher
        parked_bytes = 0 if self._parked is None else self._parked.n_bytes
        return Stats(
            batcher.n_running,
            batcher.n_waiting,
            batcher.n_kv_used,
            parked_bytes,
            self._untouched.n_bytes,
        )
