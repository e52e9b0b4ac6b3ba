"""What a template may still cost, in steps and in characters."""

from __future__ import annotations

from typing import Any, Literal

# A template's own work, before any input; the real ones need some hundreds of steps.
BASE_STEPS = 200_000
BASE_CHARS = 8 * 1024 * 1024
# Each character of the conversation may pass through this many operations.
CHARS_PER_INPUT_CHAR = 64
# Some templates look through all messages for each message.
STEPS_PER_PAIR = 4
MAX_PAIRED_MESSAGES = 2000


class TemplateFault(Exception):  # noqa: N818 - internal; the caller turns it into a UserError
    """A template can't be compiled or rendered."""

    def __init__(
        self, message: str, *, kind: Literal["broken", "refused", "exhausted"] = "broken"
    ) -> None:
        super().__init__(message)
        # refused: it called raise_exception; exhausted: it ran over its budget.
        self.kind = kind


class Budget:
    """What one rendering may still cost."""

    def __init__(self, n_input_chars: int, *, n_messages: int = 0) -> None:
        paired = min(n_messages, MAX_PAIRED_MESSAGES)
        self.steps = BASE_STEPS + n_input_chars + STEPS_PER_PAIR * paired**2
        self.chars = BASE_CHARS + CHARS_PER_INPUT_CHAR * n_input_chars

    def spend_steps(self, n: int) -> None:
        """Charge `n` iterations, calls or operations."""
        self.steps -= n
        if self.steps < 0:
            raise TemplateFault(
                "the template does too much work (a runaway loop?)", kind="exhausted"
            )

    def spend_chars(self, n: int) -> None:
        """Charge `n` characters about to be made, and one step."""
        self.spend_steps(1)
        self.chars -= n
        if self.chars < 0:
            raise TemplateFault(
                "the template produces too much text (a runaway loop?)", kind="exhausted"
            )

    def spend_value(self, value: object) -> None:
        """Charge a value by its size."""
        if isinstance(value, str):
            self.spend_chars(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend_steps(1 + len(value))
        else:
            self.spend_steps(1)

    def weigh(self, value: object) -> None:
        """Charge everything inside a value, a shared part as often as it is reached."""
        stack = [value]
        while stack:
            item = stack.pop()
            self.spend_value(item)
            # Input can't be shared with itself: it counts as one.
            if isinstance(item, (InputDict, InputList)):
                continue
            if isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple)):
                stack.extend(item)


class InputDict(dict[str, Any]):
    """A dict of the conversation; a tree, so not weighed again."""


class InputList(list[Any]):
    """A list of the conversation; a tree, so not weighed again."""
