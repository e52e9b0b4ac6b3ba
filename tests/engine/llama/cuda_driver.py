"""A driver of CUDA that notes what is said to it."""

# ruff: noqa: N802 (the driver's own names)
from __future__ import annotations

import ctypes

UNKNOWN = 101
REFUSED = 1


class Driver:
    """Two cards; `refused` is answered with an error, all else is done and noted."""

    def __init__(self, refused: str = "", *, can_lock: tuple[int, int] = (1, 1)) -> None:
        self.refused = refused
        self.limits: dict[int, int] = {}
        # The cards whose contexts are the current ones.
        self.current: list[int] = []
        # Bytes by the address of what is locked, and how: card and flags.
        self.locked: dict[int, int] = {}
        self.lockings: list[tuple[int, int]] = []
        # So many locks, and no more.
        self.n_locks_left = 10**6
        self._can_lock = can_lock

    def cuInit(self, flags: int) -> int:
        return self._answer("cuInit")

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        if ordinal >= 2:
            return UNKNOWN
        device._obj.value = ordinal
        return self._answer("cuDeviceGet")

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: ctypes.c_int) -> int:
        assert attribute == 113
        value._obj.value = self._can_lock[device.value]
        return self._answer("cuDeviceGetAttribute")

    def cuDevicePrimaryCtxRetain(self, context: object, device: ctypes.c_int) -> int:
        context._obj.value = 1000 + device.value
        return self._answer("cuDevicePrimaryCtxRetain")

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:
        if self.refused != "cuCtxPushCurrent_v2":
            self.current.append(context.value - 1000)
        return self._answer("cuCtxPushCurrent_v2")

    def cuCtxSetLimit(self, limit: int, value: ctypes.c_size_t) -> int:
        assert limit == 0
        if self.refused != "cuCtxSetLimit":
            self.limits[self.current[-1]] = value.value
        return self._answer("cuCtxSetLimit")

    def cuCtxPopCurrent_v2(self, context: object) -> int:
        context._obj.value = 1000 + self.current.pop()
        return self._answer("cuCtxPopCurrent_v2")

    def cuMemHostRegister_v2(
        self, start: ctypes.c_void_p, n_bytes: ctypes.c_size_t, flags: int
    ) -> int:
        if not self.n_locks_left:
            return REFUSED
        self.n_locks_left -= 1
        assert start.value not in self.locked
        self.locked[start.value] = n_bytes.value
        self.lockings.append((self.current[-1], flags))
        return self._answer("cuMemHostRegister_v2")

    def cuMemHostUnregister(self, start: ctypes.c_void_p) -> int:
        assert self.current
        # It has to be there still.
        ctypes.string_at(start.value, self.locked.pop(start.value))
        return self._answer("cuMemHostUnregister")

    def _answer(self, name: str) -> int:
        return REFUSED if name == self.refused else 0
