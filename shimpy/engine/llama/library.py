"""The bindings: llama_cpp.llama_cpp alone, and the symbols of ggml that it does not bind.

Importing the package `llama_cpp` costs 0.2 s (templates, servers, a logger of its own); its
module of bindings 0.05 s. All symbols are looked up through the one library handle: the wheel
holds copies of libggml, and loading one of them gives a second registry of devices.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# A failed assertion in ggml otherwise forks gdb, which takes seconds and prints pages.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")


def _without_package() -> ModuleType | None:
    """Put an empty module in the place of the package; None: it is imported already."""
    if "llama_cpp" in sys.modules:
        return None
    spec = importlib.machinery.PathFinder.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        return None
    package = ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    return package


_stub = _without_package()
from llama_cpp import llama_cpp as _bindings  # noqa: E402 (the stub has to come first)

if _stub is not None:
    # Whoever wants the whole package still gets it.
    del sys.modules["llama_cpp"]

# The bindings are ctypes all over: nothing that mypy could check.
LL: Any = _bindings
_handle: Any = LL._lib  # noqa: SLF001 (the only handle that is safe to look symbols up in)

Pointer = int
"""The address of something that llama.cpp owns."""


def bind(name: str, result: Any, *arguments: Any) -> Any:
    """Return a C function of the library, beside what the bindings made of it.

    Raises:
        AttributeError: the library has no such symbol.
    """
    return ctypes.CFUNCTYPE(result, *arguments)((name, _handle))


def bind_quick(name: str, result: Any, *arguments: Any) -> Any:
    """Return a C function that is called under the GIL: for calls of less than a microsecond."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, _handle))


def bind_cxx(symbol: str, result: Any, *arguments: Any) -> Any:
    """Return a function that gives or takes libstdc++'s types; None: they are others, or none.

    On Linux the ABI of libstdc++ fixes how its types lie.
    """
    if sys.platform != "linux":
        return None
    try:
        return bind(symbol, result, *arguments)
    except AttributeError:
        return None


def version() -> str:
    """Return the version of llama-cpp-python and of the llama.cpp in it."""
    return f"{_bindings_version()} ({LL.llama_version().decode()})"


def _bindings_version() -> str:
    """Return the package's `__version__`, which is not imported.

    importlib.metadata would know it too, after 15 ms of imports that each load would wait for.
    """
    text = Path(LL.__file__).with_name("__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"llama_cpp's package beside {LL.__file__} does not say its version")
    return found[1]
