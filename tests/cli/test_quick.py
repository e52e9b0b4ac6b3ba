"""The daemon's start is mostly imports: what it does not need at once stays out of it."""

from __future__ import annotations

import gc
import importlib
import json
import ssl
import subprocess
import sys

import pytest

from shimpy.cli.quick import quick_imports

_IMPORTED = """
import json, sys
from shimpy.cli.quick import quick_imports
import shimpy.cli.main, shimpy.cli.serve
with quick_imports():
    import shimpy.logs, shimpy.server.daemon
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_daemon_starts_without_what_only_some_requests_need() -> None:
    """Each of these takes 20 to 100 ms to import, on the way to the first answer."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED], capture_output=True, text=True, timeout=50, check=True
    )
    imported = set(json.loads(done.stdout))
    assert "aiohttp" in imported
    unneeded = {"httpx", "httpx2", "huggingface_hub", "jinja2", "llama_cpp", "numpy", "rich"}
    assert not imported & unneeded


def test_all_is_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is imported later, or connects somewhere, must not notice."""
    monkeypatch.delitem(sys.modules, "rich", raising=False)
    before = ssl.SSLContext.set_default_verify_paths
    with quick_imports():
        assert not gc.isenabled()
        assert ssl.SSLContext.set_default_verify_paths is not before
        with pytest.raises(ImportError):
            importlib.import_module("rich")
    assert gc.isenabled()
    assert ssl.SSLContext.set_default_verify_paths is before
    assert sys.modules.get("rich", ssl) is not None
