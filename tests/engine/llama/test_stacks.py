"""What is said to CUDA's driver before a load, to a driver that notes it."""

from __future__ import annotations

import pytest

from shimpy.engine.llama.stacks import limit_stacks
from shimpy.protocol.cuda import STACK_BYTES
from tests.engine.llama.cuda_driver import Driver


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
    ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxSetLimit"],
)
def test_a_driver_that_refuses_changes_nothing(refused: str) -> None:
    driver = Driver(refused)
    limit_stacks(["CUDA0"], driver)
    assert not driver.limits
    assert not driver.current
