"""Clients for JavaScript against a real daemon, run by node.

They have to be installed first: `npm install --prefix tests/clients/js`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.synthetic import CHAIN_TEXT

FOLDER = Path(__file__).parent / "js"
CLIENTS = sorted(path.name.partition(".")[0] for path in FOLDER.glob("*.test.js"))

pytestmark = [
    pytest.mark.clients,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("node") is None or not (FOLDER / "node_modules").is_dir(),
        reason="npm install --prefix tests/clients/js has not been run",
    ),
]


@pytest.mark.parametrize("client", CLIENTS)
def test_client(url: str, client: str) -> None:
    """Each has its own tests in js/<client>.test.js."""
    done = subprocess.run(
        ["node", "--test", f"{client}.test.js"],
        cwd=FOLDER,
        env=os.environ | {"SHIMPY_URL": url, "SHIMPY_CHAIN_TEXT": CHAIN_TEXT},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
