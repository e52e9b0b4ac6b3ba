"""What llama.cpp's error lines mean, in words that help."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shimpy.errors import LoadError, WorkerError

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfDeviceMemory|OutOfHostMemory|bad_alloc|std::length_error"
    r"|failed to allocate|unable to allocate|cudaMalloc failed|alloc_tensor_range: failed"
    r"|failed to allocate compute|cannot allocate memory",
    re.IGNORECASE,
)
# Lines that follow every failure and say nothing.
_EMPTY = re.compile(
    r"failed to load model\s*$|failed to initialize the context: failed to allocate"
    r"|failed to initialize batch|failed to (decode|encode), ret|^$"
)
_PREFIX = re.compile(r"^(?:\w+: )+(?=\S)")

_ADVICE = {
    r"not within the file bounds|unexpectedly reached end": ("The file is damaged: fetch it again"),
    r"invalid magic|failed to read magic": "The file is no GGUF model",
    r"unknown model architecture|unknown pre-tokenizer|unknown tokenizer": (
        "This build of llama.cpp is older than the model: update llama-cpp-python"
    ),
    r"missing tensor '?blk\.\d+\.ffn_(gate|up|down)_exps": (
        "A Mixtral file from before experts were merged into one tensor: fetch a newer "
        "conversion of the model"
    ),
    r"V cache.*requires flash": "Set flash_attn to on, or kv_type to f16",
    r"invalid split|split file|illegal split": (
        "Load the first part, -00001-of-…, with all the others beside it"
    ),
}


def load_error(what: str, errors: Sequence[str]) -> LoadError:
    """Return the error for a failed load; `what` says what failed, `errors` is the log."""
    text = reasons(errors)
    everything = "\n".join(errors)
    found = (words for pattern, words in _ADVICE.items() if re.search(pattern, everything))
    advice = next(found, None)
    out_of_memory = _OUT_OF_MEMORY.search(everything) is not None
    if out_of_memory:
        advice = "There is not enough free memory for it: a smaller context or fewer layers there"
    message = f"{what}: {text}. {advice}" if advice else f"{what}: {text}"
    return LoadError(message, out_of_memory=out_of_memory)


def refused(what: str, errors: Sequence[str]) -> WorkerError:
    """Return the error for a batch that llama.cpp did not take; `errors` is the log's end."""
    return WorkerError(f"llama.cpp refused {what}: {reasons(errors)}")


def reasons(errors: Sequence[str]) -> str:
    """Return the lines that say why, each once, without the functions' names before them."""
    telling = [line for line in errors if not _EMPTY.search(line)] or list(errors)
    lines = dict.fromkeys(_PREFIX.sub("", line) for line in telling)
    return "; ".join(lines) or "llama.cpp gave no reason"
