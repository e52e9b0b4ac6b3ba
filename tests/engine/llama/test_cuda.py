"""What is said to CUDA's driver before a load, to a driver that notes it."""

# ruff: noqa: N802 (the driver's own names)
from __future__ import annotations

import ctypes

import pytest

from shimpy.engine.llama.cuda import limit_stacks
from shimpy.protocol.cuda import STACK_BYTES


class Driver:
    """Two cards; each call that is no look-up is noted, and `refused` is answered with an error."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.limits: dict[int, int] = {}
        self.current: list[int] = []

    def cuInit(self, flags: int) -> int:
        return self._answer("cuInit")

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        if ordinal >= 2:
            return 101
        device._obj.value = ordinal
        return self._answer("cuDeviceGet")

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

    def _answer(self, name: str) -> int:
        return 1 if name == self.refused else 0


@pytest.mark.parametrize(
    ("devices", "cards"),
    [
        (["CUDA0"], {0}),
        (["CUDA1", "CPU"], {1}),
        (["CUDA0", "CUDA1"], {0, 1}),
        (["CUDA1", "CUDA7"], {1}),
        (["Vulkan0", "ROCm0", "RPC[127.0.0.1:50052]"], set()),
        ([], set()),
    ],
    ids=["one", "the-second", "both", "one-that-is-not-there", "of-others", "none"],
)
def test_only_the_cards_of_a_load_get_small_stacks(devices: list[str], cards: set[int]) -> None:
    """A context on another card would take memory there."""
    driver = Driver()
    limit_stacks(devices, driver)
    assert driver.limits == dict.fromkeys(cards, STACK_BYTES)
    assert not driver.current


@pytest.mark.parametrize(
    "refused",
    ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxSetLimit"],
)
def test_a_driver_that_refuses_changes_nothing(refused: str) -> None:
    driver = Driver(refused)
    limit_stacks(["CUDA0"], driver)
    assert not driver.limits
    assert not driver.current
