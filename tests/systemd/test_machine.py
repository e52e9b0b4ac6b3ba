"""The service under a real systemd, installed by its own command and asked as its clients do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.systemd.machine import Machine, booted, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

SHIMPY = (sys.executable, "-m", "shimpy")
UNIT = "shimpy.service"
DROP_IN = f"/run/systemd/system/{UNIT}.d/test.conf"
TIMEOUT_S = 30.0
LINES = ("logs", "--json", "--lines", "1000")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with booted(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture
def clean(machine: Machine) -> Iterator[Machine]:
    yield machine
    machine.run(*SHIMPY, "service", "uninstall")
    machine.path(DROP_IN).unlink(missing_ok=True)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s


def ask(machine: Machine) -> str:
    return machine.run(*SHIMPY, "run", "demo", "def f(x):").stdout.strip()


def fields(machine: Machine, pid: str) -> dict[str, str]:
    text = machine.path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines())


def runs_anew(machine: Machine, old: str) -> bool:
    pid, state = machine.show(UNIT, "MainPID"), machine.show(UNIT, "ActiveState")
    return pid != old and state == "active"


def drop_in(machine: Machine, text: str) -> None:
    path = machine.path(DROP_IN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[Service]\n{text}\n")
    machine.run("systemctl", "daemon-reload")


def test_the_service_is_installed_runs_as_its_user_and_goes(clean: Machine) -> None:
    machine = clean
    machine.run(*SHIMPY, "service", "install")
    assert machine.show(UNIT, "ActiveState") == "active"
    assert machine.show(UNIT, "StatusText") == "listening on http://127.0.0.1:11435"
    assert machine.run(*SHIMPY, "service", "status").returncode == 0
    assert ask(machine), "a worker loads and computes under the unit's filters"

    pid = machine.show(UNIT, "MainPID")
    status = fields(machine, pid)
    user = machine.run("id", "--user", "shimpy").stdout.strip()
    assert status["Uid"].split() == [user] * 4
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16)) == (0, 0)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    inside = ("nsenter", "--mount", "--target", pid)
    for path in ("/usr/x", "/etc/x", "/root/x", "/home/x"):
        assert "Read-only" in machine.run(*inside, "touch", path, check=False).stderr, path
    machine.run(*inside, "touch", "/var/lib/shimpy/x")

    findings = json.loads(machine.run(*SHIMPY, "doctor", "--json").stdout)
    assert {f["verdict"] for f in findings} <= {"ok", "warning"}
    (locked,) = [f for f in findings if f["check"] == "locked memory"]
    assert locked["detail"] == "unlimited", "the service's limit, not that of root's shell"

    machine.run("systemctl", "reload", UNIT)
    wait_until(lambda: '"reloaded"' in machine.run(*SHIMPY, *LINES).stdout)
    assert machine.show(UNIT, "MainPID") == pid
    machine.run(*SHIMPY, "service", "uninstall")
    assert machine.show(UNIT, "LoadState") == "not-found"
    assert not machine.path(f"/proc/{pid}").exists()
    assert machine.path("/var/lib/shimpy/state").exists()


def test_a_daemon_that_is_stuck_is_started_anew(clean: Machine) -> None:
    machine = clean
    drop_in(machine, "WatchdogSec=2\nTimeoutAbortSec=100ms\nRestartSec=0")
    machine.run(*SHIMPY, "service", "install")
    assert ask(machine)
    old = machine.show(UNIT, "MainPID")
    workers = machine.run("pgrep", "-P", old).stdout.split()
    machine.run("kill", "-STOP", old)
    wait_until(partial(runs_anew, machine, old))
    assert not any(machine.path(f"/proc/{worker}").exists() for worker in workers)
    assert "Failed with result 'watchdog'" in machine.run("journalctl", "-u", UNIT).stdout


def test_a_socket_unit_starts_it_and_holds_connections_meanwhile(clean: Machine) -> None:
    machine = clean
    machine.run(*SHIMPY, "service", "install", "--socket")
    assert machine.show(UNIT, "ActiveState") == "inactive"
    assert ask(machine)
    assert machine.show(UNIT, "ActiveState") == "active"
    old = machine.show(UNIT, "MainPID")
    machine.run("systemctl", "restart", "--no-block", UNIT)
    # The old daemon, a listening socket that nobody accepts from, or the new one: an answer.
    assert machine.run(*SHIMPY, "list").returncode == 0
    wait_until(partial(runs_anew, machine, old))
    assert ask(machine)


def test_a_user_has_one_of_their_own(machine: Machine) -> None:
    machine.run("useradd", "--create-home", "anna")
    uid = machine.run("id", "--user", "anna").stdout.strip()
    machine.run("systemctl", "start", f"user@{uid}.service")
    environ = ("env", "HOME=/home/anna", f"XDG_RUNTIME_DIR=/run/user/{uid}")
    anna = ("runuser", "-u", "anna", "--", *environ)
    try:
        machine.run(*anna, *SHIMPY, "service", "install", "--user")
        assert machine.run(*anna, *SHIMPY, "service", "status", "--user").returncode == 0
        assert machine.run(*anna, *SHIMPY, "run", "demo", "def f(x):").stdout.strip()
        assert machine.path("/home/anna/.local/state/shimpy/index.sqlite").exists()
        assert '"model_ready"' in machine.run(*anna, *SHIMPY, *LINES).stdout
    finally:
        machine.run(*anna, *SHIMPY, "service", "uninstall", "--user")
        machine.run("systemctl", "stop", f"user@{uid}.service")
