"""What lasts about a model beyond its file: parameters, prompts, how it is loaded, its names.

Settings come in layers, each laid `over` the ones before it, so that the later wins: what the
catalog says; what the model came with (an Ollama model's params, a Modelfile); what the user
set (`shimpy set`). A request's own options come last of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

CpuMoe = Literal["auto", "on", "off"] | int
Role = Literal["system", "user", "assistant"]


class Turn(msgspec.Struct, frozen=True):
    """One message that every conversation with the model begins with."""

    role: Role
    content: str


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model's lasting settings; None: not set, the layer below decides. Immutable."""

    # Ollama's option names to JSON values: temperature, num_ctx, stop (a list), ...
    parameters: Mapping[str, Any] = {}
    # "": no system message, whatever the layers below say; likewise for the other texts.
    system: str | None = None
    # Jinja, or Go's language as Ollama's templates are written in.
    template: str | None = None
    # Whether a lone prompt (Ollama's /api/generate) goes to the model as it is, as a model that
    # completes text wants it; conversations go through the template all the same.
    raw: bool | None = None
    messages: tuple[Turn, ...] | None = None
    license: str | None = None
    # Where the experts live: by free memory, all in RAM, none, or those of the first N layers.
    cpu_moe: CpuMoe | None = None
    # Seconds that the idle model stays loaded; negative: for ever.
    keep_alive_s: float | None = None
    # Further names that the model answers to, "name" or "name:tag".
    aliases: tuple[str, ...] | None = None
    # For people: what is worth knowing about the model.
    notes: str | None = None

    def over(self, lower: ModelSettings) -> ModelSettings:
        """Return these settings, with what they leave open taken from `lower`.

        Parameters are merged one by one; everything else is taken whole.
        """
        given = {
            name: value
            for name in self.__struct_fields__
            if name != "parameters" and (value := getattr(self, name)) is not None
        }
        parameters = {**lower.parameters, **self.parameters}
        return msgspec.structs.replace(lower, parameters=parameters, **given)

    def without(self, *keys: str) -> ModelSettings:
        """Return these settings less some: names of fields or of parameters."""
        parameters = {name: v for name, v in self.parameters.items() if name not in keys}
        dropped = dict.fromkeys(set(keys) & set(self.__struct_fields__) - {"parameters"})
        return msgspec.structs.replace(self, parameters=parameters, **dropped)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is set."""
        return self == NO_SETTINGS


NO_SETTINGS: Final = ModelSettings()
