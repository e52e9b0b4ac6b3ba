"""Why a worker's process ended, told from its exit status and its last words. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from enum import Enum

import msgspec


class ExitKind(Enum):
    """The ways in which a worker ends."""

    # The scheduler asked for it.
    STOPPED = "stopped"
    # The kernel killed it because the host ran out of memory.
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    # llama.cpp gave up because a GPU ran out of memory.
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    # An assertion of llama.cpp's failed.
    ABORTED = "aborted"
    # SIGBUS: a mapped file lost the page that was read.
    FILE_CHANGED = "file_changed"
    # Somebody else's SIGKILL or SIGTERM.
    KILLED = "killed"
    # Any other signal, such as SIGSEGV.
    CRASHED = "crashed"
    # A status other than 0: a Python exception.
    FAILED = "failed"
    # It sent what is no message, spoke another version, or closed its channel.
    PROTOCOL = "protocol"
    # It did not load in time.
    TOO_SLOW = "too_slow"
    # It said nothing for too long while requests waited for it.
    HUNG = "hung"
    # Status 0, unasked.
    ENDED = "ended"


class WorkerExit(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's end; `reason` continues the sentence "the worker ..."."""

    kind: ExitKind
    reason: str
    returncode: int | None

    @property
    def out_of_memory(self) -> bool:
        """Whether a placement that needs less memory may help."""
        return self.kind in {ExitKind.HOST_OUT_OF_MEMORY, ExitKind.GPU_OUT_OF_MEMORY}


# What the backends of llama.cpp print before they give up for want of memory.
_GPU_OUT_OF_MEMORY = re.compile(
    r"cudaMalloc failed: out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|ErrorOutOfDeviceMemory|hipErrorOutOfMemory|kIOGPUCommandBufferCallbackErrorOutOfMemory"
    r"|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
# A line that tells what went wrong, in llama.cpp's or Python's words.
_TELLING = re.compile(
    r"GGML_ASSERT|GGML_ABORT|CUDA error|fatal|error|terminate called|failed|what\(\)",
    re.IGNORECASE,
)
_MAX_QUOTED_LINES = 3


def classify_exit(
    returncode: int, *, last_lines: Sequence[str], n_oom_kills: int | None
) -> WorkerExit:
    """Return why a process that nobody asked to stop has ended.

    `returncode` is negative for a signal. `n_oom_kills` counts the kernel's out-of-memory kills
    during the worker's life, None where the system does not tell.
    """
    quote = quote_lines(last_lines)
    out_of_vram = any(_GPU_OUT_OF_MEMORY.search(line) for line in last_lines)
    match -returncode:
        case signal.SIGKILL if n_oom_kills:
            kind, reason = (
                ExitKind.HOST_OUT_OF_MEMORY,
                "was killed by the kernel because the host ran out of memory",
            )
        case signal.SIGKILL:
            kind = ExitKind.KILLED
            reason = (
                "was killed by a SIGKILL from outside (kill -9, or a memory limit that the "
                "system does not report)"
            )
        case signal.SIGTERM | signal.SIGINT | signal.SIGHUP:
            name = signal.Signals(-returncode).name
            kind, reason = ExitKind.KILLED, f"was ended by a {name} from outside"
        case signal.SIGBUS:
            kind, reason = (
                ExitKind.FILE_CHANGED,
                "was ended by SIGBUS: its model file was cut short or changed while it was in use",
            )
        case _ if out_of_vram:
            kind, reason = ExitKind.GPU_OUT_OF_MEMORY, "ran out of GPU memory" + quote
        case signal.SIGABRT:
            kind, reason = ExitKind.ABORTED, "was aborted by llama.cpp" + quote
        case number if number > 0:
            kind, reason = ExitKind.CRASHED, f"crashed with {_signal_name(number)}" + quote
        case 0:
            kind, reason = ExitKind.ENDED, "ended by itself" + quote
        case _:
            kind, reason = ExitKind.FAILED, f"failed with status {returncode}" + quote
    return WorkerExit(kind=kind, reason=reason, returncode=returncode)


def quote_lines(lines: Sequence[str]) -> str:
    """Return ": " and the last telling lines, or the last of any kind; "" when there are none."""
    spoken = [line.strip() for line in lines if line.strip()]
    telling = [line for line in spoken if _TELLING.search(line)]
    chosen = (telling or spoken)[-_MAX_QUOTED_LINES:]
    return ": " + " | ".join(chosen) if chosen else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
