"""One request's hold on a resident: how the server talks to a worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from shimpy.errors import (
    ContextExceededError,
    ProtocolError,
    ShimpyError,
    WorkerError,
)
from shimpy.placement.placement import Rung
from shimpy.protocol.messages import (
    Cancel,
    Delta,
    Done,
    Embed,
    Embedded,
    Failed,
    Prefilled,
    PromptPart,
    Ready,
    Submit,
    Tokenize,
    Tokenized,
)
from shimpy.scheduler.mailbox import Mail, Mailbox
from shimpy.scheduler.worker import Worker

# Inputs to embed in one message: no answer is longer than a frame, however many there are.
EMBED_INPUTS = 256


class Lease:
    """Keeps a model loaded while it is held; good for any number of calls, also at once."""

    def __init__(self, *, worker: Worker, ready: Ready, rung: Rung, load_s: float) -> None:
        self._worker = worker
        # What the worker reported when it had loaded.
        self.ready = ready
        self.rung = rung
        # Seconds that this request waited for the model to load; 0 when it was resident.
        self.load_s = load_s
        # Whether the worker has served anything under this lease to its end.
        self.completed = False

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return self._worker.pid

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta | Prefilled | Done, None]:
        """Yield what a generation gives, Done last; `submit.request` is chosen here.

        Text that waits for a slow reader runs together. Closing the generator before its end
        cancels the generation; wrap it in `contextlib.aclosing`.

        Raises:
            ShimpyError: of the kind that the worker reported.
            WorkerDiedError: the worker ended; says why.
            CapacityError: the reader fell more than mailbox.MAX_UNREAD_BYTES behind.
        """
        with self._open() as (request, mailbox):
            self._worker.send(msgspec.structs.replace(submit, request=request))
            await self._worker.wait_writable()
            while True:
                mail = await mailbox.get()
                match mail:
                    case Delta() | Prefilled():
                        yield mail
                    case Done():
                        self.completed = True
                        yield mail
                        return
                    case Failed():
                        raise error_from(mail)
                    case _:
                        raise _unexpected(mail)

    async def embed(
        self,
        inputs: Sequence[Sequence[PromptPart]],
        *,
        truncate: bool = True,
        normalize: bool = True,
        add_special: bool = True,
    ) -> Embedded:
        """Return one vector for each input; errors as for `generate`."""
        answers = [
            await self._embed(
                Embed(
                    request=0,
                    inputs=[list(parts) for parts in inputs[first : first + EMBED_INPUTS]],
                    first=first,
                    truncate=truncate,
                    normalize=normalize,
                    add_special=add_special,
                )
            )
            for first in range(0, max(1, len(inputs)), EMBED_INPUTS)
        ]
        return Embedded(
            request=answers[-1].request,
            n_embd=answers[-1].n_embd,
            data=b"".join(answer.data for answer in answers),
            n_tokens=sum(answer.n_tokens for answer in answers),
        )

    async def _embed(self, embed: Embed) -> Embedded:
        with self._open() as (request, mailbox):
            self._worker.send(msgspec.structs.replace(embed, request=request))
            await self._worker.wait_writable()
            mail = await self._next(mailbox)
            if not isinstance(mail, Embedded):
                raise _unexpected(mail)
            self.completed = True
            return mail

    async def tokenize(
        self,
        text: str = "",
        *,
        ids: Sequence[int] | None = None,
        prompt: Sequence[PromptPart] | None = None,
        add_special: bool = False,
        parse_special: bool = True,
        wants_pieces: bool = False,
    ) -> Tokenized:
        """Return the tokens of a text or of a prompt, or the text of `ids`.

        Errors as for `generate`.
        """
        with self._open() as (request, mailbox):
            self._worker.send(
                Tokenize(
                    request=request,
                    text=text,
                    ids=None if ids is None else list(ids),
                    prompt=None if prompt is None else list(prompt),
                    add_special=add_special,
                    parse_special=parse_special,
                    wants_pieces=wants_pieces,
                )
            )
            await self._worker.wait_writable()
            mail = await self._next(mailbox)
            if not isinstance(mail, Tokenized):
                raise _unexpected(mail)
            self.completed = True
            return mail

    @contextmanager
    def _open(self) -> Iterator[tuple[int, Mailbox]]:
        """Open a mailbox; left before the closing message came, the request is cancelled."""
        request, mailbox = self._worker.open_mailbox()
        try:
            yield request, mailbox
        finally:
            self._worker.close_mailbox(request)
            if not mailbox.is_answered:
                self._worker.send(Cancel(request=request))

    async def _next(self, mailbox: Mailbox) -> Mail:
        mail = await mailbox.get()
        if isinstance(mail, Failed):
            # The worker did its part; the request was at fault, or llama.cpp said no.
            raise error_from(mail)
        return mail


def error_from(failed: Failed) -> ShimpyError:
    """Return the error that a worker reported, as the class with its code."""
    cls = _CLASSES.get(failed.code, WorkerError)
    if issubclass(cls, ContextExceededError):
        return cls(failed.message, n_prompt=failed.n_prompt, n_ctx=failed.n_ctx)
    return cls(failed.message)


def _subclasses(cls: type[ShimpyError]) -> Iterator[type[ShimpyError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


_CLASSES = {cls.code: cls for cls in _subclasses(ShimpyError)}


def _unexpected(mail: Mail) -> ProtocolError:
    return ProtocolError(f"the model's worker answered with a {type(mail).__name__} message")
