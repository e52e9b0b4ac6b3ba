"""What a request or a model's defaults may set about a generation, in no dialect's names.

Every dialect parses its own fields into Options; what a request leaves open comes from the
model's defaults, and what those leave open from `protocol.Sampling`, whose defaults are
Ollama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from shimpy.protocol.messages import Sampling

_SEED_RANGE = 2**32


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
        # Mostly one of them says nothing at all, and to compare them costs next to nothing.
        if defaults == _NOTHING:
            return self
        if self == _NOTHING:
            return defaults
        return msgspec.structs.replace(defaults, **_set_in(self))

    def sampling(self, grammar: str | None = None) -> Sampling:
        """Return the part that the worker's sampler needs."""
        known = {name: v for name, v in _set_in(self).items() if name in _SAMPLING}
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


_NOTHING = Options()
_SAMPLING = frozenset(Sampling.__struct_fields__) - {"grammar"}


def _set_in(options: Options) -> dict[str, Any]:
    """Return what is set, by name."""
    given = msgspec.structs.asdict(options)
    return {name: value for name, value in given.items() if value is not None}
