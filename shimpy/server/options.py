"""What a request or a model's defaults may set about a generation, in no dialect's names.

Every dialect parses its own fields into Options; what a request leaves open comes from the
model's defaults, and what those leave open from `protocol.Sampling`, whose defaults are
Ollama's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from shimpy.errors import InvalidOptionError
from shimpy.protocol.messages import Sampling

_INT32 = 2**31 - 1
_SEED_RANGE = 2**32

# The least and greatest value of each option, both included.
_RANGES: dict[str, tuple[float, float]] = {
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
_TOKEN_ID = re.compile("[0-9]{1,9}")
MAX_STOPS = 64
MAX_STOP_CHARS = 4096


class Sampled(msgspec.Struct, frozen=True):
    """How to sample, under llama.cpp's names, which are ours; None: not set."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    # Negative: drawn afresh for each request.
    seed: int | None = None
    ignore_eos: bool | None = None
    n_keep: int | None = None


class Options(Sampled, frozen=True, kw_only=True):
    """How to sample, when to stop and how much context to load with; None: not set."""

    infill: bool | None = None
    logit_bias: Mapping[int, float] | None = None
    n_logprobs: int | None = None
    stop: tuple[str, ...] | None = None
    # New tokens at most; negative: until the model ends or the context is full.
    n_predict: int | None = None
    # How the model is loaded, if it is not: its context, and its layers on the GPU.
    n_ctx: int | None = None
    n_gpu_layers: int | None = None

    def over(self, defaults: Options) -> Options:
        """Return these options, with what they leave open taken from `defaults`."""
        given = {name: getattr(self, name) for name in self.__struct_fields__}
        set_here = {name: value for name, value in given.items() if value is not None}
        return msgspec.structs.replace(defaults, **set_here)

    def sampling(self, grammar: str | None = None) -> Sampling:
        """Return the part that the worker's sampler needs."""
        known = {
            name: getattr(self, name)
            for name in Sampling.__struct_fields__
            if name != "grammar" and getattr(self, name) is not None
        }
        if "seed" in known:
            known["seed"] = None if known["seed"] < 0 else known["seed"] % _SEED_RANGE
        if "top_k" in known:
            known["top_k"] = max(0, known["top_k"])
        # Dividing by 0 would make every logit infinite; people write 0 to mean off.
        if known.get("repeat_penalty") == 0:
            known["repeat_penalty"] = 1.0
        if "logit_bias" in known:
            known["logit_bias"] = dict(known["logit_bias"])
        return Sampling(**known, grammar=grammar)


def check_number(name: str, wire_name: str, value: float) -> None:
    """Refuse a number that the option `name` cannot have; `wire_name` is what the client wrote.

    Raises:
        InvalidOptionError: NaN, or out of range.
    """
    low, high = _RANGES[name]
    # Written so that NaN is refused too.
    if not low <= value <= high:
        raise InvalidOptionError(
            f'option "{wire_name}" must be from {low:g} to {high:g}, not {str(value)[:40]}',
            option=wire_name,
        )


def check_stop(wire_name: str, stop: list[str]) -> tuple[str, ...]:
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
