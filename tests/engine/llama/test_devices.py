"""What this build can use, and that finding out is cheap."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from shimpy.engine.llama import list_devices
from shimpy.engine.llama.devices import device_of_buffer_name


def test_the_host_is_a_device() -> None:
    info = list_devices()
    host = next(device for device in info.devices if device.kind == "cpu")
    assert host.name == "CPU"
    assert host.backend == "CPU"
    assert host.description
    assert 0 < host.free_bytes <= host.total_bytes
    assert host.total_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.05)
    assert info.llama_cpp.startswith("0.3.")
    assert "CPU" in info.system_info


def test_gpu_offload_means_that_a_gpu_is_listed() -> None:
    info = list_devices()
    assert info.supports_gpu_offload == any(d.kind in ("gpu", "igpu") for d in info.devices)


@pytest.mark.parametrize(
    ("buffer", "device"),
    [
        ("CPU", "CPU"),
        ("CPU_Mapped", "CPU"),
        ("CPU_REPACK", "CPU"),
        ("CUDA_Host", "CPU"),
        ("Vulkan_Host", "CPU"),
        ("CUDA1", "CUDA1"),
    ],
)
def test_buffers_belong_to_devices(buffer: str, device: str) -> None:
    assert device_of_buffer_name(buffer) == device


def test_only_the_bindings_are_imported() -> None:
    """The package's templates, servers and logger cost 0.15 s at each start of a worker."""
    code = """
import sys
import shimpy.engine.llama
print(*[m for m in ("llama_cpp.llama", "llama_cpp._logger", "llama_cpp._ggml", "jinja2", "asyncio")
        if m in sys.modules])
import llama_cpp
print(llama_cpp.Llama.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50
    )
    assert done.stdout.split() == ["Llama"]
