"""The errors that shimpy raises on purpose.

    ShimpyError
    ├── UserError               the caller asked for something that cannot be
    │   ├── InvalidNameError        a model name that does not parse
    │   ├── InvalidOptionError      an option's value is of a wrong type or out of range
    │   ├── ContextExceededError    the prompt is longer than the context
    │   └── UnsupportedError        the model or this build lacks the capability
    ├── NotFoundError           no such model, file or route
    ├── CapacityError           not now, or not on this machine
    │   ├── DoesNotFitError         no placement fits
    │   ├── QueueFullError          too many are waiting
    │   ├── DiskFullError           no room on the disk
    │   └── StoppingError           the daemon is going down and takes nothing new
    ├── RegistryError           something stored is wrong
    │   ├── StoreLockedError        another daemon owns the store
    │   └── GgufError               a file is not a GGUF model that can be read
    ├── RemoteError             a hub or another server on the network failed or refused
    │   └── OfflineError            the network may not be used
    ├── WorkerError             a worker failed
    │   ├── LoadError               llama.cpp could not load the model
    │   ├── WorkerDiedError         the process ended while it was needed
    │   └── HeldBackError           the model's workers died too often in a row
    ├── ProtocolError           the two ends of a channel do not understand each other
    └── DaemonError             the daemon answered a client with an error
        └── UnreachableError        no daemon answers at the address

A message says what happened, to which thing, with numbers, and what to do.
HTTP statuses are decided in server/errors.py, exit codes in cli/errors.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

# In the daemon's answer to a mistake of the caller's own: the error's code.
ERROR_CODE_HEADER: Final = "X-Error-Code"


class ShimpyError(Exception):
    """Base of all errors that carry a message for the user; `code` is stable."""

    code: ClassVar[str] = "error"

    @property
    def message(self) -> str:
        """The text for the user."""
        return str(self.args[0]) if self.args else self.code


class UserError(ShimpyError):
    """The caller asked for something that cannot be."""

    code = "bad_request"


class InvalidNameError(UserError):
    """A model name that does not parse."""

    code = "invalid_name"


class InvalidOptionError(UserError):
    """An option's value is of a wrong type or out of range; `option` names it."""

    code = "invalid_option"

    def __init__(self, message: str, *, option: str = "") -> None:
        super().__init__(message)
        self.option = option


class ContextExceededError(UserError):
    """The prompt is longer than the context."""

    code = "context_exceeded"

    def __init__(self, message: str, *, n_prompt: int = 0, n_ctx: int = 0) -> None:
        super().__init__(message)
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class UnsupportedError(UserError):
    """The model, or this build of llama.cpp, lacks the capability that was asked for."""

    code = "unsupported"


class NotFoundError(ShimpyError):
    """No such model, file or route."""

    code = "not_found"


class CapacityError(ShimpyError):
    """Not now, or not on this machine."""

    code = "capacity"


class DoesNotFitError(CapacityError):
    """No placement of the model fits; the message names the device and the missing bytes."""

    code = "does_not_fit"


class QueueFullError(CapacityError):
    """Too many requests are waiting; `retry_after_s` is a guess at when there is room."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DiskFullError(CapacityError):
    """There is no room on the disk for what was to be written; nothing that was there is lost."""

    code = "disk_full"


class StoppingError(CapacityError):
    """The daemon is going down and takes nothing new."""

    code = "stopping"

    def __init__(self, message: str = "the daemon is stopping; try again in a moment") -> None:
        super().__init__(message)
        self.retry_after_s = 5.0


class RegistryError(ShimpyError):
    """Something in a model folder or in the store is wrong."""

    code = "registry"


class StoreLockedError(RegistryError):
    """Another process owns the store; the message names it."""

    code = "store_locked"

    def __init__(self, message: str, *, owner: int | None) -> None:
        """`owner` is the process's id, where it is known."""
        super().__init__(message)
        self.owner = owner


class GgufError(RegistryError):
    """A file is not a GGUF model that can be read; `path` and the reason are in the message."""

    code = "gguf"


class RemoteError(ShimpyError):
    """A hub or another server on the network failed or refused; the message has its reason."""

    code = "remote"


class OfflineError(RemoteError):
    """The network may not be used: a setting or a variable says so."""

    code = "offline"


class WorkerError(ShimpyError):
    """A worker failed."""

    code = "worker"


class LoadError(WorkerError):
    """llama.cpp could not load the model; carries its own last error lines."""

    code = "load_failed"

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class WorkerDiedError(WorkerError):
    """A worker's process ended while a request needed it."""

    code = "worker_died"


class HeldBackError(WorkerError):
    """A model's workers died several times in a row; it is tried again after `retry_after_s`."""

    code = "held_back"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ProtocolError(ShimpyError):
    """The two ends of a channel do not understand each other."""

    code = "protocol"


class DaemonError(ShimpyError):
    """The daemon answered a client with an error; `status` is HTTP's."""

    code = "daemon"

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class UnreachableError(DaemonError):
    """No daemon answers at the address."""

    code = "unreachable"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to say after a name that is none: the nearest one, or else all there are."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
