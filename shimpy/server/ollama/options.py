"""Ollama's `options` object: names and types as api/types.go has them.

A key that is not known is ignored (Ollama logs it); null is the same as leaving it out. A
wrong type is a 400 with Ollama's own text, where Ollama itself answers 500.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from shimpy.errors import InvalidOptionError
from shimpy.server.options import Options, check_logit_bias, check_number, check_stop

# Ollama's name: shimpy's. Those that map to None are taken and have no effect here: the
# planner and the scheduler decide what they would set, or llama.cpp has dropped them.
_INTEGERS: dict[str, str | None] = {
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
_FLOATS: dict[str, str | None] = {
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
_BOOLEANS = frozenset(
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

OPTION_NAMES = frozenset({*_INTEGERS, *_FLOATS, *_BOOLEANS, "stop", "logit_bias"})


def parse_options(given: Mapping[str, Any] | None) -> Options:
    """Return Ollama's `options` as Options.

    Raises:
        InvalidOptionError: a value of a wrong type or out of range; `option` names it.
    """
    values: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if value is None:
            continue
        if name in _INTEGERS:
            _set_number(values, name, _INTEGERS[name], _integer(name, value))
        elif name in _FLOATS:
            _set_number(values, name, _FLOATS[name], _float(name, value))
        elif name in _BOOLEANS:
            if not isinstance(value, bool):
                raise _wrong_type(name, "boolean")
        elif name == "stop":
            values["stop"] = _stop(value)
        elif name == "logit_bias":
            values["logit_bias"] = check_logit_bias(name, value)
    return Options(**values)


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that are to last, with the values as they are kept; null is left out.

    Raises:
        InvalidOptionError: there is no such option, or its value can't be.
    """
    for name in given:
        if name not in OPTION_NAMES:
            near = difflib.get_close_matches(name, OPTION_NAMES, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise InvalidOptionError(f"unknown parameter '{name}'{meant}", option=name)
    parse_options(given)
    kept = {name: value for name, value in given.items() if value is not None}
    if isinstance(kept.get("stop"), str):
        kept["stop"] = [kept["stop"]]
    return kept


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
        raise _wrong_type(name, "integer")
    return value


def _float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "float32")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong_type("stop", "an array of strings")
    return check_stop("stop", texts)


def _wrong_type(name: str, wanted: str) -> InvalidOptionError:
    kind = wanted if wanted.startswith("an ") else f"of type {wanted}"
    return InvalidOptionError(f'option "{name}" must be {kind}', option=name)
