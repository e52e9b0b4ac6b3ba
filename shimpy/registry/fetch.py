"""One remote file into the store: resumed, retried, hashed as it comes, kept when it breaks off.

What has come is a prefix of the file, in the store's `partial` folder. Each attempt asks for the
bytes after it. A file whose digest is known goes on from whatever an earlier pull left, since
the digest at the end proves the whole; one without goes on only while its server vouches by a
mark (ETag, Last-Modified) that it is still the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from shimpy.errors import RemoteError
from shimpy.registry import disk
from shimpy.registry.attempts import Retries, Stop
from shimpy.registry.blobs import Blobs, BlobWriter, DigestMismatchError
from shimpy.registry.manifest import digest_of
from shimpy.registry.remote import Body, RemoteFile, ShrunkError, TransientError
from shimpy.units import MIB, format_bytes

# Less than this between two failures is no progress: a line that drops after a few bytes each
# time would be tried for ever.
_PROGRESS_BYTES: Final = MIB
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

# Called with the bytes of the file that are there, whenever there are more.
OnProgress = Callable[[int], None]


class Fetcher(msgspec.Struct, frozen=True, kw_only=True):
    """Fetches files into a store's blobs; each file is fetched by one thread at a time."""

    blobs: Blobs
    retries: Retries = msgspec.field(default_factory=Retries)

    def fetch(self, file: RemoteFile, *, stop: Stop, on_progress: OnProgress) -> str:
        """Return the digest of a file once it is a blob of the store; blocking.

        Raises:
            RemoteError: the server refuses, or fails too often in a row.
            DiskFullError: there is no room for it.
            DigestMismatchError: it is not what its listing says; nothing of it is kept.
            StoppedError: the work is to end.
        """
        # What an earlier pull left may have been damaged since; then all of it comes once more.
        path = self._fetch_once(file, stop, on_progress) or self._fetch_once(
            file, stop, on_progress
        )
        assert path is not None, "the second time there was nothing to go on from"
        if not file.digest:
            self.blobs.discard_working(working_key(file))
        return digest_of(path) or ""

    def _fetch_once(self, file: RemoteFile, stop: Stop, on_progress: OnProgress) -> Path | None:
        """Return the path of the blob; None: it went on from a beginning that was damaged."""
        with self._begin(file) as writer:
            was_resumed = writer.n_bytes > 0
            self._complete(_Transfer(file, writer, self.blobs, stop, on_progress))
            try:
                return self._commit(file, writer)
            except DigestMismatchError as error:
                if was_resumed:
                    return None
                raise DigestMismatchError(
                    f"{file.name} came whole, but is not what its listing says: {error.message}. "
                    "Nothing of it was kept; the server or the line is at fault"
                ) from error

    def _begin(self, file: RemoteFile) -> BlobWriter:
        if file.digest:
            return self.blobs.begin(file.digest)
        return self.blobs.begin_unnamed(working_key(file))

    def _complete(self, transfer: _Transfer) -> None:
        """Read on until the file is whole."""
        n_failed = 0
        while not transfer.is_whole:
            before = transfer.writer.n_bytes
            try:
                transfer.read_on()
            except TransientError as error:
                came = transfer.writer.n_bytes - before
                n_failed = 1 if came >= _PROGRESS_BYTES else n_failed + 1
                self.retries.give_up_or_wait(error, n_failed, transfer.stop)

    def _commit(self, file: RemoteFile, writer: BlobWriter) -> Path:
        if file.git_oid and not file.digest and writer.git_oid() != file.git_oid:
            writer.discard()
            raise DigestMismatchError(f"its git object is not {file.git_oid}")
        return writer.commit()


def working_key(file: RemoteFile) -> str:
    """Return under which key the beginning of a file without a digest is kept."""
    return f"{file.name} {file.url}"


class _ChangedError(TransientError):
    """The file on the server is another one than that whose beginning is here."""


class _Transfer:
    """One file on its way."""

    def __init__(
        self,
        file: RemoteFile,
        writer: BlobWriter,
        blobs: Blobs,
        stop: Stop,
        on_progress: OnProgress,
    ) -> None:
        self.writer = writer
        self.stop = stop
        self._file = file
        self._on_progress = on_progress
        # Where the server's mark of a file without a digest is remembered.
        self._mark = None if file.digest else blobs.working_folder(working_key(file)) / "mark"
        # None: only the end of the stream will tell.
        self._total = file.size_bytes
        self._has_ended = False
        if self._total is not None and writer.n_bytes > self._total:
            writer.restart()
        on_progress(writer.n_bytes)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are there."""
        if self._total is None:
            return self._has_ended
        return self.writer.n_bytes == self._total

    def read_on(self) -> None:
        """Append what the server sends, to the end if all goes well.

        Raises:
            TransientError: it broke off; what came is there.
            RemoteError: it does not send what was promised.
        """
        try:
            with (
                self._file.open(self.writer.n_bytes, None) as body,
                self.stop.breaking(body.abort),
            ):
                self._check_same(body)
                self._append(body)
        except (ShrunkError, _ChangedError):
            self.writer.restart()
            raise
        if self._total is not None and not self.is_whole:
            raise TransientError(
                f"{self._file.name}: the server ended at byte {self.writer.n_bytes} of "
                f"{self._total}"
            )
        self._has_ended = True

    def _check_same(self, body: Body) -> None:
        """Make sure that the bytes to come belong behind those that are here."""
        if self._mark is None:
            if _SHA256.fullmatch(body.etag) and f"sha256:{body.etag}" != self._file.digest:
                raise RemoteError(
                    f"{self._file.name}: the server has another file now than its listing says "
                    f"({body.etag[:12]}..., not {self._file.digest[7:19]}...); pull again"
                )
        elif self.writer.n_bytes and (not body.etag or _read_mark(self._mark) != body.etag):
            raise _ChangedError(f"{self._file.name}: the file has changed on its server")
        else:
            disk.write_file(self._mark, body.etag.encode())
        listed = self._file.size_bytes
        if body.total_bytes is not None:
            if listed not in {None, body.total_bytes}:
                raise RemoteError(
                    f"{self._file.name}: its listing says {listed} bytes, its server "
                    f"{body.total_bytes}; it was changed or is not wholly there"
                )
            self._total = body.total_bytes

    def _append(self, body: Body) -> None:
        # A server that does no ranges begins anew: what is here already is passed over.
        to_skip = self.writer.n_bytes - body.start
        for chunk in body.chunks:
            self.stop.check()
            fresh = chunk[to_skip:] if to_skip else chunk
            to_skip = max(0, to_skip - len(chunk))
            if not fresh:
                continue
            if self._total is not None and self.writer.n_bytes + len(fresh) > self._total:
                raise RemoteError(
                    f"{self._file.name}: the server sends more than {format_bytes(self._total)}, "
                    "the size that it gave"
                )
            self.writer.write(fresh)
            self._on_progress(self.writer.n_bytes)


def _read_mark(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
