"""What the headers of known files said, kept in SQLite so that a restart opens none of them.

A cache and nothing more: when it is damaged, of another version or out of reach, it is made
anew or done without.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec.structs import fields

from shimpy.gguf.arch import LayerShape, ModelShape

# To be raised when what is stored means something else though the fields are the same.
_MEANING: Final = 1
_BUSY_TIMEOUT_S: Final = 2.0
_CREATE: Final = (
    "CREATE TABLE headers (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, record BLOB NOT NULL) "
    "WITHOUT ROWID"
)

Kind = Literal["model", "broken", "projector", "part"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model's files from their headers."""

    # part: an adapter or the like, which only serves a model.
    kind: Kind
    # Hex sha256 over the headers' bytes and the files' sizes.
    digest: str
    shape: ModelShape | None = None
    error: str | None = None
    # Holds until a file changes; else it is worth another look at once, and not kept.
    is_lasting: bool = True


class HeaderIndex:
    """Records by the path of a model's first file and the stamp of all of its files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Why the index is done without, in words; None: it works.
        self.problem: str | None = None

    def load(self) -> dict[str, tuple[str, bytes]]:
        """Return stamp and encoded record by path; empty when the index can't be read."""
        try:
            with closing(self._connect()) as database:
                rows = database.execute("SELECT path, stamp, record FROM headers").fetchall()
        except sqlite3.DatabaseError as error:
            self._give_up_or_rebuild(error)
            return {}
        except OSError as error:
            self._report(error)
            return {}
        return {path: (stamp, record) for path, stamp, record in rows}

    def store(self, changed: Mapping[str, tuple[str, Record]], gone: Iterable[str]) -> bool:
        """Keep records and forget paths, in one transaction; return whether that was done."""
        rows = [(path, stamp, encode(record)) for path, (stamp, record) in changed.items()]
        paths = [(path,) for path in gone]
        if not rows and not paths:
            return True
        try:
            with closing(self._connect()) as database, database:
                database.executemany("INSERT OR REPLACE INTO headers VALUES (?, ?, ?)", rows)
                database.executemany("DELETE FROM headers WHERE path = ?", paths)
        except sqlite3.DatabaseError as error:
            self._give_up_or_rebuild(error)
        except OSError as error:
            self._report(error)
        else:
            self.problem = None
            return True
        return False

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S)
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != _SCHEMA_VERSION:
                # Nothing is lost with an empty table: what waits for it need not wait for the disk.
                database.execute("PRAGMA synchronous = OFF")
                with database:
                    database.execute("DROP TABLE IF EXISTS headers")
                    database.execute(_CREATE)
                    database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                database.execute("PRAGMA synchronous = FULL")
        except BaseException:
            database.close()
            raise
        return database

    def _give_up_or_rebuild(self, error: sqlite3.DatabaseError) -> None:
        """Remove a damaged file; one that is locked or out of reach may yet be good."""
        if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
            self._report(error)
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as unlink_error:
            self._report(unlink_error)

    def _report(self, error: Exception) -> None:
        self.problem = f"{self._path}: the index of headers can't be used: {error}"


def encode(record: Record) -> bytes:
    """Return a record's bytes for the index."""
    return _ENCODER.encode(record)


def decode(data: bytes) -> Record | None:
    """Return the record in `data`; None: it is none, so that its file must be read again."""
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError:
        return None


def _is_damage(error: sqlite3.OperationalError) -> bool:
    """Whether a table is not what this version made; locks and permissions are no damage."""
    return error.sqlite_errorcode == sqlite3.SQLITE_ERROR


def _fields_version() -> int:
    """Return a number that changes with the fields of what is stored (user_version: 31 bits)."""
    names = [field.name for kind in (Record, ModelShape, LayerShape) for field in fields(kind)]
    return zlib.crc32(f"{_MEANING} {names}".encode()) & 0x7FFFFFFF


_SCHEMA_VERSION: Final = _fields_version()
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Record)
