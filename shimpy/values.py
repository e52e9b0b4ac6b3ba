"""The values of settings, read from what people write in files, variables and flags.

Each function takes what it was given and returns the value, or raises an InvalidOptionError
that says what it must be; whoever calls it says which setting it was.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from shimpy.errors import InvalidNameError, InvalidOptionError
from shimpy.names import parse_model_name
from shimpy.units import parse_bytes, parse_duration

DEFAULT_PORT = 11435
DEFAULT_BIND = f"127.0.0.1:{DEFAULT_PORT}"
UNIX = "unix:"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+")

# Tools whose model stores are read too.
Tool = Literal["huggingface", "ollama", "lmstudio", "llama.cpp", "ramalama"]
TOOLS: tuple[Tool, ...] = get_args(Tool)

Parser = Callable[[Any], Any]


def parse_int(minimum: int) -> Parser:
    """Return a parser of whole numbers of at least `minimum`."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise InvalidOptionError(f"it must be a whole number, not {value!r}")
        try:
            number = int(value)
        except ValueError:
            raise InvalidOptionError(f"it must be a whole number, not {value!r}") from None
        if number < minimum:
            raise InvalidOptionError(f"it must be at least {minimum}, not {number}")
        return number

    return parse


def parse_choice(*choices: str) -> Parser:
    """Return a parser of one of some words; TOML's true and false are on and off."""

    def parse(value: Any) -> str:
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value).lower()
        if text not in choices:
            raise InvalidOptionError(f"it must be one of {', '.join(choices)}, not {value!r}")
        return text

    return parse


def parse_switch(value: Any) -> bool:
    """Return whether a switch is on."""
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value).lower()
    if text not in {"on", "true", "yes", "1", "off", "false", "no", "0"}:
        raise InvalidOptionError(f"it must be on or off, not {value!r}")
    return text in {"on", "true", "yes", "1"}


def parse_size(value: Any) -> int:
    """Return bytes: a number of them, or a text like 512MiB."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if not isinstance(value, str):
        raise InvalidOptionError(f"it must be a size like 512MiB, not {value!r}")
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise InvalidOptionError(str(error)) from None


def parse_keep_alive(value: Any) -> float:
    """Return seconds: a number is seconds, a text a Go duration or seconds; negative: forever.

    Raises:
        InvalidOptionError: neither.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidOptionError(f"it must be a duration like 5m, not {value!r}")
    seconds = _duration(value) if isinstance(value, str) else float(value)
    if math.isnan(seconds):
        raise InvalidOptionError("it must be a duration like 5m, not NaN")
    return math.inf if seconds < 0 else seconds


def _duration(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parse_duration(text)
    except ValueError as error:
        raise InvalidOptionError(str(error)) from None


def parse_seconds(value: Any) -> float:
    """Return seconds as `parse_keep_alive`, but never for ever."""
    seconds = parse_keep_alive(value)
    if math.isinf(seconds):
        raise InvalidOptionError(f"it must be a limited time, not {value!r}")
    return seconds


def parse_pause(value: Any) -> float:
    """Return seconds as `parse_keep_alive`, at least one."""
    seconds = parse_keep_alive(value)
    if seconds < 1:
        raise InvalidOptionError(f"it must be at least 1s, or negative for never, not {value!r}")
    return seconds


def split_paths(value: Any) -> tuple[Path, ...]:
    """Return the folders in a list, or in one text that joins several with ':' or ';'."""
    items = value if isinstance(value, list | tuple) else [value]
    parts: list[str] = []
    for item in items:
        if not isinstance(item, str | os.PathLike):
            raise InvalidOptionError(f"it must be a list of folders, not {value!r}")
        parts += os.fspath(item).replace(";", os.pathsep).split(os.pathsep)
    return tuple(dict.fromkeys(Path(part).expanduser().absolute() for part in parts if part))


def parse_stores(value: Any) -> tuple[Tool, ...]:
    """Return the tools that are named: a list, or a text with commas; all, or none."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise InvalidOptionError(f"it must be a list of tools, not {value!r}")
    names = {item.strip().lower() for item in items} - {""}
    unknown = sorted(names - {*TOOLS, "none", "all"})
    if unknown or ("none" in names and len(names) > 1):
        raise InvalidOptionError(
            f"it must be all, none or some of {', '.join(TOOLS)}, not {', '.join(sorted(names))!r}"
        )
    return TOOLS if "all" in names else tuple(tool for tool in TOOLS if tool in names)


def parse_model(value: Any) -> str:
    """Return the name of a model; "": none."""
    if not isinstance(value, str):
        raise InvalidOptionError(f"it must be the name of a model, not {value!r}")
    try:
        return str(parse_model_name(value)) if value.strip() else ""
    except InvalidNameError as error:
        raise InvalidOptionError(str(error)) from None


def parse_models(value: Any) -> tuple[str, ...]:
    """Return names of models: a list, or a text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise InvalidOptionError(f"it must be a list of models, not {value!r}")
    names = (parse_model(item) for item in items)
    return tuple(dict.fromkeys(name for name in names if name))


def parse_folder(value: Any) -> Path:
    """Return a folder's absolute path; ~ is the user's home."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InvalidOptionError(f"it must be a folder, not {value!r}")
    return Path(value).expanduser().absolute()


def parse_file(value: Any) -> Path:
    """Return a file's absolute path; ~ is the user's home."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InvalidOptionError(f"it must be a file, not {value!r}")
    return Path(value).expanduser().absolute()


def parse_origins(value: Any) -> tuple[str, ...]:
    """Return web origins, in lower case, without a slash at the end."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise InvalidOptionError(f"it must be a list of origins, not {value!r}")
    origins = tuple(dict.fromkeys(item.strip().rstrip("/").lower() for item in items))
    for origin in origins:
        if origin and origin != "*" and not _ORIGIN.fullmatch(origin):
            raise InvalidOptionError(
                f"an origin is written like https://chat.example or * for all, not {origin!r}"
            )
    return tuple(origin for origin in origins if origin)


def parse_bind(value: Any) -> str:
    """Return "host:port" or "unix:/path" as given, checked.

    ":8080" and "8080" mean the loopback address.

    Raises:
        InvalidOptionError: no port, or one that is none.
    """
    text = str(value).strip()
    if text.isdigit():
        text = f":{text}"
    if text.startswith(UNIX):
        if not text.removeprefix(UNIX):
            raise InvalidOptionError("it must name a socket file, like unix:/run/shimpy.sock")
        return UNIX + str(Path(text.removeprefix(UNIX)).expanduser().absolute())
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004 - the highest port
        raise InvalidOptionError(
            f"it must be an address and a port like {DEFAULT_BIND} or [::1]:{DEFAULT_PORT}, or "
            f"unix:/path, not {value!r}"
        )
    return f"{host or '127.0.0.1'}:{port}"
