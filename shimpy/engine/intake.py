"""What the reader thread does with each message, so that the loop need not.

It tokenizes, refuses what can never run, and answers Tokenize by itself; all else goes into
the loop's inbox, which is bounded: when the loop falls behind, the daemon's sends wait.
"""

from __future__ import annotations

import os
import queue
import sys
import traceback
from collections.abc import Callable, Iterable

import msgspec

from shimpy.engine.backend import Backend, n_ctx_seq
from shimpy.engine.prompt import Prompts, check_ids, fit_prompt
from shimpy.errors import (
    ContextExceededError,
    ProtocolError,
    ShimpyError,
    UnsupportedError,
    WorkerError,
)
from shimpy.protocol.messages import (
    Cancel,
    Embed,
    Embedded,
    Failed,
    LimitParked,
    Load,
    SetThreads,
    Shutdown,
    Submit,
    ToDaemon,
    Tokenize,
    Tokenized,
    ToWorker,
)

INBOX_MESSAGES = 1024


class Prompted(msgspec.Struct, frozen=True):
    """A Submit whose prompt is tokenized and fits the context."""

    submit: Submit
    ids: list[int]
    arrived_s: float


class Inputs(msgspec.Struct, frozen=True):
    """An Embed whose inputs are tokenized and fit one batch each."""

    embed: Embed
    ids: list[list[int]]


Work = Prompted | Inputs | Cancel | SetThreads | LimitParked | Shutdown
Inbox = queue.Queue[Work]


class Intake:
    """Receives for one worker; nothing but Shutdown is expected before `serve` is called."""

    def __init__(self, *, send: Callable[[ToDaemon], None], clock: Callable[[], float]) -> None:
        self.inbox: Inbox = queue.Queue(INBOX_MESSAGES)
        self._send = send
        self._clock = clock
        self._backend: Backend | None = None
        self._embeds = False

    def serve(self, backend: Backend, *, embeds: bool) -> None:
        """Accept requests for a model from now on; `embeds`: for vectors, not for text."""
        self._prompts = Prompts(backend)
        self._embeds = embeds
        self._backend = backend

    def run(self, messages: Iterable[ToWorker]) -> None:
        """Handle messages until the daemon is gone, then end the process at once.

        There is no one left to answer to, whatever the loop is busy with. Runs in a thread of
        its own.
        """
        try:
            for message in messages:
                self.on_message(message)
        except OSError:
            pass
        except BaseException:  # noqa: BLE001 - the thread's boundary: nothing may end it quietly
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)

    def on_message(self, message: ToWorker) -> None:
        """Handle one message."""
        match message:
            case Submit() | Embed() | Tokenize():
                self._on_request(message)
            case Shutdown() if self._backend is None:
                # The loop is busy loading and can't be asked to stop.
                os._exit(0)
            case Cancel() | SetThreads() | LimitParked() | Shutdown():
                self.inbox.put(message)
            case Load():
                raise ProtocolError("a second Load: a worker holds one model")

    def _on_request(self, message: Submit | Embed | Tokenize) -> None:
        try:
            if self._backend is None:
                raise WorkerError("the worker has no model yet")
            match message:
                case Submit():
                    self.inbox.put(self._prompted(self._backend, message))
                case Embed(inputs=[]):
                    self._send(Embedded(message.request, self._backend.n_embd, b"", 0))
                case Embed():
                    self.inbox.put(self._inputs(self._backend, message))
                case Tokenize():
                    self._send(self._tokenized(self._backend, message))
        except ContextExceededError as error:
            self._send(
                Failed(
                    message.request,
                    error.code,
                    error.message,
                    n_prompt=error.n_prompt,
                    n_ctx=error.n_ctx,
                )
            )
        except ShimpyError as error:
            self._send(Failed(message.request, error.code, error.message))

    def _prompted(self, backend: Backend, submit: Submit) -> Prompted:
        arrived_s = self._clock()
        if self._embeds:
            raise UnsupportedError("the model was loaded for embeddings; it does not generate")
        ids = self._prompts.tokenize(submit.prompt, add_bos=submit.add_bos)
        ids = fit_prompt(
            ids, n_ctx=n_ctx_seq(backend), n_keep=submit.n_keep, truncate=submit.truncate
        )
        return Prompted(submit, ids, arrived_s)

    def _inputs(self, backend: Backend, embed: Embed) -> Inputs:
        if not self._embeds and not backend.can_split:
            raise UnsupportedError(
                "a recurrent model that generates text gives no embeddings: its state after a "
                "text can't be computed apart from the text"
            )
        # A model that generates keeps a place in its context for what it would say next.
        n_most = backend.n_ctx if self._embeds else backend.n_ctx - 1
        end_ids = backend.end_ids if embed.add_special else []
        n_max = n_most - len(end_ids)
        inputs = []
        for index, parts in enumerate(embed.inputs, embed.first):
            ids = self._prompts.tokenize(parts, add_bos=embed.add_special)
            if len(ids) > n_max and not embed.truncate:
                raise ContextExceededError(
                    f"input {index} has {len(ids)} tokens, and the model embeds at most {n_max} "
                    f"at once; shorten it, or let it be truncated",
                    n_prompt=len(ids),
                    n_ctx=n_max,
                )
            inputs.append(ids[:n_max] + end_ids)
        return Inputs(embed, inputs)

    def _tokenized(self, backend: Backend, message: Tokenize) -> Tokenized:
        if message.ids is not None:
            ids = check_ids(backend, message.ids)
            data = b"".join(backend.piece(token, special=True) for token in ids)
            text = data.decode("utf-8", "replace")
        elif message.prompt is not None:
            ids = self._prompts.tokenize(message.prompt, add_bos=message.add_special)
            text = ""
        else:
            ids = backend.tokenize(message.text, parse_special=message.parse_special)
            if message.add_special:
                ids = [backend.bos_id] * backend.add_bos + ids + backend.end_ids
            text = message.text
        pieces = []
        if message.wants_pieces:
            pieces = [backend.piece(token, special=True) for token in ids]
        return Tokenized(message.request, ids, text, pieces)
