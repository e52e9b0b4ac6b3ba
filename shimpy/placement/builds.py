"""What the installed llama.cpp's files tell of it, without the time that starting it takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from shimpy.protocol.messages import BuildInfo

_BINDINGS: Final = "llama-cpp-python"
# Backends are libraries of their own beside ggml's, or in ggml's own where it is linked in one.
_BACKEND: Final = "libggml-"
_WITHOUT_DEVICES: Final = ("libggml-base.", "libggml-cpu.", "libggml-cpu-")
# What makes the bindings or llama.cpp load other libraries.
_ELSEWHERE: Final = ("LLAMA_CPP_LIB_PATH", "GGML_BACKEND_PATH")


def installed_lib() -> Path | None:
    """Return the folder of the installed bindings' libraries; None: there is none."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "lib"


def cpu_build(lib: Path | None, environ: Mapping[str, str] = os.environ) -> BuildInfo | None:
    """Return what a build is that has no backend but the CPU's; None: it has to be asked."""
    if lib is None or any(environ.get(name) for name in _ELSEWHERE):
        return None
    try:
        backends = [path.name for path in lib.iterdir() if path.name.startswith(_BACKEND)]
        bindings = version(_BINDINGS)
    except (OSError, PackageNotFoundError):
        return None
    has_cpu = any(name.startswith(_WITHOUT_DEVICES[1:]) for name in backends)
    if not has_cpu or not all(name.startswith(_WITHOUT_DEVICES) for name in backends):
        return None
    return BuildInfo(llama_cpp=bindings, devices=[], supports_gpu_offload=False)
