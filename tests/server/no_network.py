"""Run in a network namespace: a session with a daemon, and no way out of the machine.

Beside loopback there is nothing, so whatever needs more fails; where there is strace, the test
looks for who so much as tried.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.daemon import running_daemon
from tests.synthetic import CHAIN_TEXT, write_chain


def main(folder: Path) -> None:
    """Use every command that has no business on the network, and pull, which must say so."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    models = folder / "models"
    models.mkdir()
    write_chain(models / "chain.gguf")
    with running_daemon(folder / "home", models, "--offline") as daemon:
        answer = daemon.shimpy("run", "chain", "hello")
        assert answer.stdout == f"{CHAIN_TEXT}\n", answer.stderr
        for command in (["list"], ["ps"], ["show", "chain"], ["plan", "chain"], ["stop", "chain"]):
            done = daemon.shimpy(*command)
            assert done.returncode == 0, (command, done.stderr)
        pulled = daemon.shimpy("pull", "hf.co/a/b")
        assert pulled.returncode != 0
        assert "offline" in pulled.stderr, pulled.stderr
        log = daemon.log.read_text()
        assert "Traceback" not in log, log


if __name__ == "__main__":
    main(Path(sys.argv[1]))
