"""Smaller stacks for the threads on CUDA cards: VRAM that a context takes and no kernel needs.

The driver keeps a stack of 1,024 bytes for every thread that a card can run at once, 264 MiB on an
H200 (132 multiprocessors of 2,048 threads). llama.cpp's kernels need 40 bytes and less, but for
some 30 of them: 5 of its 6,991 for that card need more than 256, and none more than 296
(`cuobjdump -res-usage`). A kernel that needs more gets it: the driver raises the limit then, for
good (CUDA driver API, CU_LIMIT_STACK_SIZE). Measured: 198 MiB less on that card, all on it and
with experts in RAM, with the same logits and no other speed.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from typing import Any

from shimpy.protocol.cuda import STACK_BYTES

# cuda.h, enum CUlimit: CU_LIMIT_STACK_SIZE.
_STACK_SIZE = 0


def limit_stacks(devices: Iterable[str], driver: Any = None) -> None:
    """Set the stack limit of the cards among some devices, by llama.cpp's names ("CUDA0").

    It makes the context that llama.cpp will use, on no other card. Where the driver refuses,
    all stays as it is. `driver`: libcuda, which is looked for unless given.
    """
    ordinals = [int(found[1]) for name in devices if (found := re.fullmatch(r"CUDA(\d+)", name))]
    if not ordinals:
        return
    cuda = driver or _find_driver()
    if cuda is None or cuda.cuInit(0):
        return
    for ordinal in ordinals:
        _limit_stack(cuda, ordinal)


def _find_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _limit_stack(cuda: Any, ordinal: int) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuDeviceGet(ctypes.byref(device), ordinal):
        return
    # The CUDA runtime, and so llama.cpp, shares it. Given back it would be made anew.
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return
    if cuda.cuCtxPushCurrent_v2(context):
        return
    cuda.cuCtxSetLimit(_STACK_SIZE, ctypes.c_size_t(STACK_BYTES))
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
