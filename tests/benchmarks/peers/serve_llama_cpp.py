"""llama-cpp-python's own server, without repacked weights; run by the peers' Python.

Its settings do not name llama.cpp's `use_extra_bufts`, which is on by default and ends the
process on some machines with AMX; off it is the same as for the other contenders.
"""

from __future__ import annotations

import llama_cpp.llama_cpp as bindings
from llama_cpp.server.__main__ import main

_defaults = bindings.llama_model_default_params


def _without_repack() -> bindings.llama_model_params:
    params = _defaults()
    params.use_extra_bufts = False
    return params


bindings.llama_model_default_params = _without_repack
main()  # type: ignore[no-untyped-call]
