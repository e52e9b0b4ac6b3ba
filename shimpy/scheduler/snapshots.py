"""When the hardware is looked at: for a load that waits, and every few seconds. Pure.

    (none wanted) --want, on_time--> wanted --begin--> on its way --end--> (none wanted)

One that is overtaken by a change of the residents can't be told apart from the memory of before:
it is thrown away, and another one taken.
"""

from __future__ import annotations

import math

# Between two looks at free memory at least so many times as long as one takes.
_LOOK_SHARE = 50.0


class Snapshots:
    """Knows whether a snapshot is wanted, or on its way, and when the next look is due."""

    def __init__(self) -> None:
        self.is_on_its_way = False
        # When free memory is to be looked at again; inf: there is nothing to look after.
        self._look_at_s = math.inf
        # What one is wanted for.
        self._for_look = False
        self._for_load = False
        self._is_overtaken = False
        self._begun_s = 0.0

    @property
    def is_look(self) -> bool:
        """Whether the snapshot that has come is one to look around with."""
        return self._for_look

    @property
    def deadline_s(self) -> float:
        """When on_time is to be called next; inf: not before another event."""
        return math.inf if self._for_look else self._look_at_s

    def want(self) -> None:
        """Have one taken if a load waits for it: there may be room now."""
        self._for_load = True

    def overtake(self) -> None:
        """Note that the residents have changed."""
        self._is_overtaken = self.is_on_its_way
        self._for_load = True

    def on_time(self, now: float) -> None:
        """Have one taken if it is time for a look."""
        if now >= self._look_at_s:
            self._for_look = True

    def keep_looking(self, now: float, interval_s: float, *, is_needed: bool) -> None:
        """Look at intervals as long as there is a loaded model to move."""
        if interval_s <= 0 or not is_needed:
            self._for_look = False
            self._look_at_s = math.inf
        elif math.isinf(self._look_at_s):
            self._look_at_s = now + interval_s

    def begin(self, now: float, *, is_awaited: bool) -> bool:
        """Return whether one is to be taken now; `is_awaited`: some model waits to be placed."""
        if self.is_on_its_way:
            return False
        self.is_on_its_way = self._for_look or (self._for_load and is_awaited)
        self._for_load = False
        if self.is_on_its_way:
            self._begun_s = now
        return self.is_on_its_way

    def end(self) -> bool:
        """Take note that it has come; return whether it is of use, or was overtaken."""
        self.is_on_its_way = False
        if self._is_overtaken:
            self._is_overtaken = False
            self._for_load = True
            return False
        return True

    def looked(self, now: float, interval_s: float) -> None:
        """Arrange the next look; where a snapshot takes long, they are taken less often."""
        self._for_look = False
        self._look_at_s = now + max(interval_s, _LOOK_SHARE * (now - self._begun_s))

    def fail(self, now: float, interval_s: float) -> None:
        """Take note that none could be taken."""
        self.is_on_its_way = False
        self._is_overtaken = self._for_look = False
        self._look_at_s = now + interval_s
