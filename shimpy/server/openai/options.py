"""The options in OpenAI's bodies: top-level fields, over Ollama's `options` where they are sent.

What neither says is the model's or shimpy's own default, not OpenAI's (a temperature of 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from shimpy.errors import InvalidOptionError
from shimpy.parameters import check_logit_bias, check_number, check_stop
from shimpy.server.ollama.options import parse_options
from shimpy.server.openai.wire import SamplingBody
from shimpy.server.options import Options
from shimpy.server.requests import Think, ThinkLevel

_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
# Ollama's reading of the levels that it has no words for.
_EFFORTS: Mapping[str, Think] = {
    "none": False,
    "minimal": "low",
    "xhigh": "max",
    "ultra": "max",
    **{level: level for level in get_args(ThinkLevel)},
}


def parse_sampling(
    body: SamplingBody,
    *,
    max_tokens: tuple[str, int | None],
    n_logprobs: tuple[str, int | None],
) -> Options:
    """Return the options of a request; the last two come with their names on the wire.

    Raises:
        InvalidOptionError: a value of a wrong type or out of range; `option` names it.
    """
    values: dict[str, Any] = {}
    for name in _NUMBERS:
        if (value := getattr(body, name)) is not None:
            check_number(name, name, value)
            values[name] = value
    for name, (wire_name, count) in (("n_predict", max_tokens), ("n_logprobs", n_logprobs)):
        if count is not None:
            check_number(name, wire_name, count)
            values[name] = count
    if body.stop is not None:
        stop = [body.stop] if isinstance(body.stop, str) else body.stop
        values["stop"] = check_stop("stop", stop)
    if body.logit_bias is not None:
        values["logit_bias"] = check_logit_bias("logit_bias", body.logit_bias)
    return Options(**values).over(parse_options(body.options))


def parse_effort(name: str, *given: str | None) -> Think:
    """Return whether, and how hard, the model is to think, by the first effort that is given.

    Raises:
        InvalidOptionError: an unknown effort; `name` is the field's.
    """
    for effort in given:
        if effort is None:
            continue
        if effort not in _EFFORTS:
            raise InvalidOptionError(
                f"{name} must be one of {', '.join(_EFFORTS)}, not {effort[:40]!r}", option=name
            )
        return _EFFORTS[effort]
    return None
