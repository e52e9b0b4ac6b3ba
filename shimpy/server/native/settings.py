"""`key=value` changes to a model's lasting settings, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from shimpy.errors import InvalidNameError, InvalidOptionError, suggest
from shimpy.names import parse_model_name
from shimpy.parameters import PARAMETER_NAMES, WITHOUT_EFFECT, check_parameters
from shimpy.registry.settings import CpuMoe, ModelSettings, Turn
from shimpy.units import FOREVER_S
from shimpy.values import parse_keep_alive

# What goes by another name too, as llama.cpp's users and shimpy's own config know it.
_ALIASES: Final = {"n_ctx": "num_ctx", "n_gpu_layers": "num_gpu", "alias": "aliases"}
_FIELDS: Final = (
    "cpu_moe", "keep_alive", "system", "template", "raw", "messages", "license", "aliases",
    "notes",
)  # fmt: skip
_KNOWN: Final = PARAMETER_NAMES | set(_FIELDS)
_OWN_NAMES: Final = {"keep_alive": "keep_alive_s"}
_MAX_TEXT: Final = 1024 * 1024


def changed(
    settings: ModelSettings, given: Mapping[str, Any], unset: Sequence[str]
) -> ModelSettings:
    """Return settings with some set and some taken back.

    Args:
        settings: what the user has set so far.
        given: keys to JSON values, or to the texts that people type for them.
        unset: keys; what is below the user's settings holds again for them.

    Raises:
        InvalidOptionError: there is no such key, or its value can't be.
    """
    keys = [_key(key) for key in unset]
    result = settings.without(*(_OWN_NAMES.get(key, key) for key in keys))
    parameters = dict(result.parameters)
    fields: dict[str, Any] = {}
    for key, value in given.items():
        name = _key(key)
        if name in PARAMETER_NAMES:
            parameters |= check_parameters({name: [value] if _is_one_stop(name, value) else value})
        else:
            fields[_OWN_NAMES.get(name, name)] = _PARSERS[name](name, value)
    return msgspec.structs.replace(result, parameters=parameters, **fields)


def _key(key: str) -> str:
    name = _ALIASES.get(key.lower(), key.lower())
    if name not in _KNOWN:
        raise InvalidOptionError(
            f"there is no setting {key!r}; {suggest(name, _KNOWN - WITHOUT_EFFECT)}", option=key
        )
    return name


def _is_one_stop(name: str, value: Any) -> bool:
    return name == "stop" and isinstance(value, str)


def _cpu_moe(key: str, value: Any) -> CpuMoe:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if (isinstance(value, int) and value >= 0) or value in ("auto", "on", "off"):
        return cast("CpuMoe", value)
    raise InvalidOptionError(
        f"{key} must be auto, on, off or a number of layers, not {value!r}", option=key
    )


def _keep_alive(key: str, value: Any) -> float:
    try:
        seconds = parse_keep_alive(value)
    except InvalidOptionError as error:
        raise InvalidOptionError(f"{key}: {error.message}", option=key) from None
    return -1.0 if seconds >= FOREVER_S else seconds


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise InvalidOptionError(
            f"{key} must be a text of at most {_MAX_TEXT} characters", option=key
        )
    return value


def _switch(key: str, value: Any) -> bool:
    known = {"on": True, "off": False}
    if isinstance(value, str):
        value = known.get(value.lower())
    if not isinstance(value, bool):
        raise InvalidOptionError(f"{key} must be on or off", option=key)
    return value


def _aliases(key: str, value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise InvalidOptionError(f"{key} must be a list of names", option=key)
    try:
        return tuple(str(parse_model_name(item)) for item in items if item.strip())
    except InvalidNameError as error:
        raise InvalidOptionError(f"{key}: {error.message}", option=key) from None


def _messages(key: str, value: Any) -> tuple[Turn, ...]:
    try:
        return msgspec.convert(value, tuple[Turn, ...])
    except msgspec.ValidationError as error:
        raise InvalidOptionError(
            f'{key} must be a list of {{"role", "content"}}: {error}', option=key
        ) from None


_PARSERS: Final = {
    "cpu_moe": _cpu_moe,
    "keep_alive": _keep_alive,
    "system": _text,
    "template": _text,
    "raw": _switch,
    "messages": _messages,
    "license": _text,
    "aliases": _aliases,
    "notes": _text,
}
