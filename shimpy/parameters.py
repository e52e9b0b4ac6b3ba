"""What may be set about a generation: its range, and Ollama's name and type for it. Pure.

The daemon reads requests by this, and the command line what people type, so that both refuse
the same in the same words. Ollama's names and types are those of its api/types.go. A wrong type
is told in Ollama's own text, though as the client's fault, where Ollama answers 500.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shimpy.errors import InvalidOptionError, suggest

_INT32: Final = 2**31 - 1

# The least and greatest value of each number, both included, under llama.cpp's names.
_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "temperature": (0, 1000),
    "top_k": (-_INT32, _INT32),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repeat_last_n": (-1, _INT32),
    "repeat_penalty": (0, 1000),
    "presence_penalty": (-1000, 1000),
    "frequency_penalty": (-1000, 1000),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 1000),
    "mirostat_eta": (0, 1000),
    "top_n_sigma": (-1, 1000),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dynatemp_range": (0, 1000),
    "dynatemp_exponent": (0, 1000),
    "seed": (-(2**63), 2**64 - 1),
    "n_predict": (-2, _INT32),
    "n_keep": (-1, _INT32),
    "n_ctx": (1, _INT32),
    "n_gpu_layers": (-1, _INT32),
    "n_logprobs": (0, 20),
}
_TOKEN_ID: Final = re.compile("[0-9]{1,9}")
MAX_STOPS: Final = 64
MAX_STOP_CHARS: Final = 4096

# Ollama's name: llama.cpp's, which is ours. Those that map to None are taken and have no effect:
# the planner and the scheduler decide what they would set, or llama.cpp has dropped them.
_INTEGERS: Final[Mapping[str, str | None]] = {
    "num_keep": "n_keep",
    "seed": "seed",
    "num_predict": "n_predict",
    "top_k": "top_k",
    "repeat_last_n": "repeat_last_n",
    "mirostat": "mirostat",
    "num_ctx": "n_ctx",
    "num_gpu": "n_gpu_layers",
    "num_batch": None,
    "main_gpu": None,
    "num_thread": None,
    "draft_num_predict": None,
    "num_gqa": None,
}
_FLOATS: Final[Mapping[str, str | None]] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
    "tfs_z": None,
}
_BOOLEANS: Final = frozenset(
    {
        "use_mmap",
        "use_mlock",
        "low_vram",
        "numa",
        "f16_kv",
        "logits_all",
        "vocab_only",
        "penalize_newline",
    }
)
PARAMETER_NAMES: Final = frozenset({*_INTEGERS, *_FLOATS, *_BOOLEANS, "stop", "logit_bias"})
WITHOUT_EFFECT: Final = _BOOLEANS | {
    name for name, ours in {**_INTEGERS, **_FLOATS}.items() if ours is None
}


# --- Ollama's parameters ----------------------------------------------------------------------


def read_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under llama.cpp's names, without those that have no effect.

    A key that is not known is ignored, as by Ollama; null is the same as leaving it out.

    Raises:
        InvalidOptionError: a value of a wrong type or out of range; `option` names it.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in _INTEGERS:
            _set_number(values, name, _INTEGERS[name], _integer(name, value))
        elif name in _FLOATS:
            _set_number(values, name, _FLOATS[name], _float(name, value))
        elif name in _BOOLEANS:
            if not isinstance(value, bool):
                raise _wrong_type(name, "of type boolean", value)
        elif name == "stop":
            values["stop"] = _stop(value)
        elif name == "logit_bias":
            values["logit_bias"] = check_logit_bias(name, value)
    return values


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters that somebody has set by name, as they are kept; null is left out.

    Raises:
        InvalidOptionError: there is no such parameter, or its value can't be.
    """
    for name in given:
        if name not in PARAMETER_NAMES:
            hint = suggest(name, PARAMETER_NAMES - WITHOUT_EFFECT)
            raise InvalidOptionError(f"unknown parameter '{name}'; {hint}", option=name)
    read_parameters(given)
    kept = {name: value for name, value in given.items() if value is not None}
    if isinstance(kept.get("stop"), str):
        kept["stop"] = [kept["stop"]]
    return kept


def add_typed(parameters: dict[str, Any], name: str, text: str) -> None:
    """Set a parameter to what somebody typed for it; each `stop` is one more.

    Raises:
        InvalidOptionError: there is no such parameter, or that is no value of it.
    """
    value = check_parameters({name: _typed(name, text)})[name]
    if name == "stop":
        value = [*parameters.get("stop", ()), *value]
    parameters[name] = value


def _typed(name: str, text: str) -> Any:
    """Return a text as the type that a parameter has; as it is where it is none of that type."""
    try:
        if name in _INTEGERS:
            return int(text)
        if name in _FLOATS:
            return float(text)
        if name in _BOOLEANS or name == "logit_bias":
            return json.loads(text)
    except ValueError:
        pass
    return text


def _set_number(values: dict[str, Any], name: str, ours: str | None, value: float) -> None:
    # Ollama reads 0 as "not set" for the context, and -1 as "decide yourself" for the layers.
    if ours is None or (ours == "n_ctx" and value == 0) or (ours == "n_gpu_layers" and value < 0):
        return
    check_number(ours, name, value)
    values[ours] = value


def _integer(name: str, value: Any) -> int:
    # JSON has one kind of number; Ollama truncates 4096.0 to an integer too.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(name, "of type integer", value)
    return value


def _float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "of type float32", value)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong_type("stop", "an array of strings", value)
    return check_stop("stop", texts)


def _wrong_type(name: str, wanted: str, value: Any) -> InvalidOptionError:
    shown = reprlib.repr(value)
    return InvalidOptionError(f'option "{name}" must be {wanted}, not {shown}', option=name)


# --- one value, in any dialect ----------------------------------------------------------------


def check_number(name: str, wire_name: str, value: float) -> None:
    """Refuse a number that the option `name` cannot have; `wire_name` is what the client wrote.

    Raises:
        InvalidOptionError: NaN, or out of range.
    """
    low, high = _RANGES[name]
    # Written so that NaN is refused too.
    if not low <= value <= high:
        raise InvalidOptionError(
            f'option "{wire_name}" must be from {low} to {high}, not {str(value)[:40]}',
            option=wire_name,
        )


def check_stop(wire_name: str, stop: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings without empty ones.

    Raises:
        InvalidOptionError: too many, or one that is too long.
    """
    if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in stop):
        raise InvalidOptionError(
            f'option "{wire_name}" may hold at most {MAX_STOPS} strings of at most '
            f"{MAX_STOP_CHARS} characters",
            option=wire_name,
        )
    return tuple(text for text in stop if text)


def check_logit_bias(wire_name: str, value: Any) -> dict[int, float]:
    """Return {token id: bias} of a JSON object with ids as keys.

    Raises:
        InvalidOptionError: a key that is no token id, or a value that is no number.
    """
    if not isinstance(value, dict):
        raise InvalidOptionError(f'option "{wire_name}" must be an object', option=wire_name)
    bias: dict[int, float] = {}
    for key, amount in value.items():
        is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if not _TOKEN_ID.fullmatch(str(key)) or not is_number:
            raise InvalidOptionError(
                f'option "{wire_name}" must map token ids to numbers, not {key!r} to {amount!r}',
                option=wire_name,
            )
        bias[int(key)] = float(amount)
    return bias
