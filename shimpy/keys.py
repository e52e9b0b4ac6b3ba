"""API keys: made and revoked by `shimpy keys`, looked up by the daemon.

A key is 256 random bits, shown once and kept as its SHA-256. A slow hash such as scrypt guards
secrets that can be guessed; these can't be, and a slow hash on every request would only give
whoever sends wrong keys a way to keep the daemon busy.

The file is written whole or not at all, under a lock, and read again when it has changed: a
key that is revoked stops working with the next request.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import msgspec

from shimpy.errors import NotFoundError, RegistryError, UserError
from shimpy.registry.disk import create_temporary, explained, make_folder, publish, sync_file

# infer: ask models and look at them. manage: change what is installed. admin: everything.
Scope = Literal["infer", "manage", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

# Of the file in the state folder.
KEYS_NAME = "keys.json"
_PREFIX = "shimpy-"
_SECRET_BYTES = 32
_VERSION = 1


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of one key; immutable."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    # Seconds since the epoch.
    created_s: float

    def allows(self, scope: Scope) -> bool:
        """Whether a request that needs `scope` may be made with it."""
        return scope in self.scopes or "admin" in self.scopes


class _File(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    keys: tuple[Key, ...]


class KeyFile:
    """The keys in one file; its methods block for a moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # What the file was when it was read: device, inode, size, modification time.
        self._seen: tuple[int, ...] | None = None
        self._keys: tuple[Key, ...] = ()

    def all(self) -> tuple[Key, ...]:
        """Return all keys, the oldest first.

        Raises:
            RegistryError: the file is there and can't be read, or holds something else.
        """
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, ()
            return ()
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        seen = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen != self._seen:
            self._keys = self._read()
            self._seen = seen
        return self._keys

    def find(self, token: str) -> Key | None:
        """Return the key that a client sent, if it is one; errors as `all`."""
        digest = _digest(token)
        found = [key for key in self.all() if hmac.compare_digest(key.sha256, digest)]
        return found[0] if found else None

    def create(self, name: str, scopes: Sequence[Scope]) -> tuple[Key, str]:
        """Add a key and return it with its secret, which is kept nowhere.

        Raises:
            UserError: there is one of this name.
            DiskFullError, RegistryError: it can't be written; nothing has changed.
        """
        token = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        with self._locked() as keys:
            if any(key.name == name for key in keys):
                raise UserError(f"there is a key named {name!r}; choose another name or revoke it")
            key = Key(
                id=secrets.token_hex(4),
                name=name,
                scopes=tuple(scope for scope in SCOPES if scope in scopes),
                sha256=_digest(token),
                created_s=time.time(),
            )
            self._write((*keys, key))
        return key, token

    def revoke(self, which: str) -> Key:
        """Remove the key of this id or name and return it.

        Raises:
            NotFoundError: there is none.
            DiskFullError, RegistryError: it can't be written; nothing has changed.
        """
        with self._locked() as keys:
            for key in keys:
                if which in {key.id, key.name}:
                    self._write(tuple(other for other in keys if other is not key))
                    return key
        raise NotFoundError(f"there is no key {which!r}; `shimpy keys list` shows them")

    @contextmanager
    def _locked(self) -> Iterator[tuple[Key, ...]]:
        """Keep others from writing for as long as the block runs."""
        with explained(self._path):
            make_folder(self._path.parent)
            lock = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self.all()
        finally:
            os.close(lock)

    def _read(self) -> tuple[Key, ...]:
        try:
            file = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._unreadable(str(error)) from error
        if file.version != _VERSION:
            raise self._unreadable(f"it is of version {file.version}, not {_VERSION}")
        return file.keys

    def _unreadable(self, reason: str) -> RegistryError:
        return RegistryError(f"the API keys in {self._path} can't be read: {reason}")

    def _write(self, keys: tuple[Key, ...]) -> None:
        data = msgspec.json.format(msgspec.json.encode(_File(version=_VERSION, keys=keys)))
        with explained(self._path):
            temporary, file = create_temporary(self._path.parent)
            try:
                with file:
                    os.fchmod(file.fileno(), 0o600)
                    if os.geteuid() == 0:
                        # Root makes keys for the service's own user, whose folder it is.
                        owner = self._path.parent.stat()
                        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
                    file.write(data)
                    sync_file(file)
                publish(temporary, self._path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
