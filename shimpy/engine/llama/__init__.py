"""llama.cpp behind the Backend protocol: the only importer of llama_cpp.

Its low-level API is used through ctypes; foreign types, pointers and failures end here.
Much of what llama.cpp refuses it refuses by aborting the process, so sizes and ids are
checked before each call.
"""

from shimpy.engine.llama.backend import LlamaBackend, open_backend
from shimpy.engine.llama.devices import list_devices
from shimpy.engine.llama.simulate import simulate

__all__ = ["LlamaBackend", "list_devices", "open_backend", "simulate"]
