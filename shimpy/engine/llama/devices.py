"""The devices that this build of llama.cpp can use."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Literal

from shimpy.engine.llama.library import LL, Pointer, bind, version
from shimpy.engine.llama.log import install_log
from shimpy.errors import LoadError
from shimpy.protocol.messages import BuildInfo, DeviceInfo

# ggml-backend.h, enum ggml_backend_dev_type; 4 ("meta") wraps devices that are listed anyway.
_KINDS: dict[int, Literal["cpu", "gpu", "igpu", "accel"]] = {
    0: "cpu",
    1: "gpu",
    2: "igpu",
    3: "accel",
}
_HOST_KINDS = ("cpu", "accel")
HOST = "CPU"


class _Props(ctypes.Structure):
    """ggml-backend.h, struct ggml_backend_dev_props, with room for more capabilities."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 64),
    )


_dev_count = bind("ggml_backend_dev_count", ctypes.c_size_t)
_dev_get = bind("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_dev_name = bind("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_dev_type = bind("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_dev_props = bind("ggml_backend_dev_get_props", None, ctypes.c_void_p, ctypes.POINTER(_Props))
_dev_reg = bind("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
_reg_name = bind("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p)
_buft_device = bind("ggml_backend_buft_get_device", ctypes.c_void_p, ctypes.c_void_p)
_buft_is_host = bind("ggml_backend_buft_is_host", ctypes.c_bool, ctypes.c_void_p)


def list_devices() -> BuildInfo:
    """Return this build's version and devices, with their free memory now.

    A GPU backend opens each device for that, which takes memory of its own until the process
    ends: ask a process that ends.
    """
    install_log()
    LL.llama_backend_init()
    return BuildInfo(
        llama_cpp=version(),
        devices=[info for device in _devices() if (info := _describe(device)) is not None],
        supports_gpu_offload=bool(LL.llama_supports_gpu_offload()),
        system_info=LL.llama_print_system_info().decode(errors="replace").strip(),
    )


def find_devices(names: list[str]) -> list[Pointer]:
    """Return the devices of these names; host memory is no device of a placement.

    Raises:
        LoadError: this build has no such device; the message lists those that it has.
    """
    known = {_text(_dev_name(device)): device for device in _devices()}
    for name in names:
        if name not in known:
            raise LoadError(
                f"this build of llama.cpp has no device {name}; it has {', '.join(known)}"
            )
    return [known[name] for name in names if _KINDS.get(_dev_type(known[name])) not in _HOST_KINDS]


def device_of_buffer(buffer_type: Pointer) -> str:
    """Return the device whose memory a buffer type takes; page-locked memory is the host's."""
    if _buft_is_host(buffer_type):
        return HOST
    device = _buft_device(buffer_type)
    if not device or _KINDS.get(_dev_type(device)) in _HOST_KINDS:
        return HOST
    return _text(_dev_name(device))


def device_of_buffer_name(name: str) -> str:
    """Return the device from the name of its buffer type, as the log has it ("CUDA0")."""
    if name.startswith("CPU") or name.endswith("_Host"):
        return HOST
    return name


def _devices() -> Iterator[Pointer]:
    return (_dev_get(i) for i in range(_dev_count()))


def _describe(device: Pointer) -> DeviceInfo | None:
    props = _Props()
    _dev_props(device, ctypes.byref(props))
    kind = _KINDS.get(props.type)
    if kind is None:
        return None
    return DeviceInfo(
        name=_text(props.name),
        description=_text(props.description),
        kind=kind,
        backend=_text(_reg_name(_dev_reg(device))),
        free_bytes=props.memory_free,
        total_bytes=props.memory_total,
        device_id=_text(props.device_id),
    )


def _text(raw: bytes | None) -> str:
    return raw.decode(errors="replace") if raw else ""
