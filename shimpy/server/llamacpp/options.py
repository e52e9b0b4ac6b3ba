"""The options in llama.cpp's bodies, over Ollama's `options` where they are sent.

What neither says is the model's or shimpy's own default, not that of llama.cpp's server.
"""

from __future__ import annotations

import math
from typing import Any

from shimpy.errors import InvalidOptionError
from shimpy.parameters import check_number, check_stop
from shimpy.protocol.messages import Sampling
from shimpy.server.llamacpp.wire import CompletionBody
from shimpy.server.ollama.options import parse_options
from shimpy.server.options import Options, Sampled

_NUMBERS = tuple(name for name in Sampled.__struct_fields__ if name != "ignore_eos")
# Those that the worker's sampler knows, too.
_SAMPLED = tuple(name for name in Sampled.__struct_fields__ if name not in {"seed", "n_keep"})
# llama.h, LLAMA_DEFAULT_SEED: draw one.
_RANDOM_SEED = 0xFFFFFFFF
# Of the names in `samplers` the one that is not a matter of its own option's value.
_INFILL = "infill"
_MAX_BIASES = 4096


def parse_sampling(body: CompletionBody) -> tuple[Options, dict[str, float]]:
    """Return the options of a completion, and what is to be added to the tokens of some texts.

    Raises:
        InvalidOptionError: a value of a wrong type or out of range; `option` names it.
    """
    values: dict[str, Any] = {}
    n_predict = body.max_tokens if body.n_predict is None else body.n_predict
    given = [(name, name, getattr(body, name)) for name in _NUMBERS]
    given += [
        ("n_predict", "n_predict", n_predict),
        ("n_logprobs", "n_probs", body.n_probs or None),
    ]
    for name, wire_name, value in given:
        if value is not None:
            check_number(name, wire_name, value)
            values[name] = value
    if body.ignore_eos is not None:
        values["ignore_eos"] = body.ignore_eos
    if _INFILL in (body.samplers or []):
        values["infill"] = True
    if values.get("seed") == _RANDOM_SEED:
        values["seed"] = -1
    if body.stop is not None:
        values["stop"] = check_stop(
            "stop", [body.stop] if isinstance(body.stop, str) else body.stop
        )
    by_id, by_text = parse_logit_bias(body.logit_bias)
    if by_id:
        values["logit_bias"] = by_id
    return Options(**values).over(parse_options(body.options)), by_text


def parse_logit_bias(given: Any) -> tuple[dict[int, float], dict[str, float]]:
    """Return what is added to the logits of tokens, by id and by text.

    Raises:
        InvalidOptionError: it is in none of llama.cpp's two forms, or too long.
    """
    pairs = list(given.items()) if isinstance(given, dict) else given or []
    if len(pairs) > _MAX_BIASES:
        raise _bad_bias(f"holds {len(pairs)} entries; at most {_MAX_BIASES} are taken")
    by_id: dict[int, float] = {}
    by_text: dict[str, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:  # noqa: PLR2004 - a pair
            raise _bad_bias(f"must be pairs of a token and an amount, not {str(pair)[:40]}")
        key, amount = pair[0], -math.inf if pair[1] is False else pair[1]
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise _bad_bias(f"must add a number, or false, to {str(key)[:40]!r}")
        if isinstance(key, str) and not key.isdecimal():
            by_text[key] = float(amount)
        elif isinstance(key, int | str) and not isinstance(key, bool):
            by_id[_token_id(key)] = float(amount)
        else:
            raise _bad_bias(f"names {str(key)[:40]}, which is neither a token's id nor a text")
    return by_id, by_text


def settings_entry(options: Options, sampling: Sampling) -> dict[str, Any]:
    """Return `generation_settings`: what was in force, under llama.cpp's names."""
    n_predict = -1 if options.n_predict is None else options.n_predict
    return {
        "seed": _RANDOM_SEED if sampling.seed is None else sampling.seed,
        **{name: getattr(sampling, name) for name in _SAMPLED},
        "stop": list(options.stop or ()),
        "max_tokens": n_predict,
        "n_predict": n_predict,
        "n_keep": options.n_keep or 0,
        "logit_bias": [
            # JSON has no infinity.
            {"bias": amount if math.isfinite(amount) else False, "token": token}
            for token, amount in sampling.logit_bias.items()
        ],
        "n_probs": sampling.n_logprobs or 0,
        "grammar": sampling.grammar or "",
    }


def _token_id(key: int | str) -> int:
    token = int(key) if len(str(key)) <= len(str(2**31)) else -1
    if not 0 <= token < 2**31:
        raise _bad_bias(f"names token {str(key)[:40]}, which is no token's id")
    return token


def _bad_bias(what: str) -> InvalidOptionError:
    return InvalidOptionError(f'"logit_bias" {what}', option="logit_bias")
