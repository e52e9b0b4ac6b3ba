"""What rendering a conversation gives."""

from __future__ import annotations

import msgspec

from shimpy.protocol.messages import PromptPart, Text


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, and how it must be submitted."""

    parts: list[PromptPart]
    # False: the template wrote the start token itself.
    add_bos: bool = True
    # Strings that end an answer, for families whose end is no token.
    stop: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))
