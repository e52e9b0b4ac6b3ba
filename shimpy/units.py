"""Bytes and durations: parsed from what people type, printed as they read them."""

from __future__ import annotations

import math
import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# 365 days times 292: past what Go's time.Duration holds, so "forever" for every client.
FOREVER_S = math.inf

# At most 18 digits: beyond any memory, and within what a float and every client can hold.
_BYTES = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmgt]?)(i?b?)\s*", re.IGNORECASE)
_BYTE_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_DURATION = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h)")
_DURATION_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}


def parse_bytes(text: str) -> int:
    """Return the bytes meant by "8GiB", "8G", "512m" or "1000"; units are powers of 1024.

    Memory is sold and reported in powers of 1024, so "8GB" is read as 8 GiB too.

    Raises:
        ValueError: the text is no size; the message is for the user.
    """
    match = _BYTES.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is not a size; write it like 8GiB, 512MiB or 1.5G')
    number, unit, _ = match.groups()
    return int(float(number) * KIB ** _BYTE_POWERS[unit.lower()])


def format_bytes(n_bytes: float) -> str:
    """Return a size as people read it: "931 B", "10.1 GiB"."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < KIB:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= KIB
    return f"{size:.1f} TiB"


def parse_duration(text: str) -> float:
    """Return the seconds meant by a Go duration: "300ms", "1.5h", "2h45m", "-1s", "0".

    Source: Go's time.ParseDuration, which Ollama applies to keep_alive.

    Raises:
        ValueError: the text is no duration; a bare number is none, except 0. The message is for
            the user.
    """
    body = text.strip()
    if body == "0":
        return 0.0
    sign = -1.0 if body.startswith("-") else 1.0
    unsigned = body[1:] if body[:1] in "+-" else body
    parts = _DURATION.findall(unsigned)
    if not parts or "".join(parts) != unsigned or "-" in unsigned or "+" in unsigned:
        raise ValueError(f'"{text}" is not a duration; write it with units, like 300s, 5m or 1h30m')
    total = 0.0
    for part in parts:
        unit = part.lstrip("0123456789.")
        total += float(part[: -len(unit)]) * _DURATION_UNITS[unit]
    return sign * total


def format_duration(seconds: float) -> str:
    """Return a duration as people read it: "forever", "850ms", "4m59s", "2h5m"."""
    if math.isinf(seconds):
        return "forever"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m"
    if minutes:
        return f"{minutes}m{secs}s"
    return f"{secs}s"
