"""API keys and Unix sockets: who gets in, and to what."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace

from shimpy.errors import UserError
from shimpy.keys import KeyFile
from shimpy.server.app import all_routes
from shimpy.server.gate import scope_of
from tests.daemon import running_daemon
from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Running]:
    folder = tmp_path / "models"
    folder.mkdir()
    async with running_app(folder, tmp_path, engine_argv=FAKE_ENGINE) as running:
        yield running


async def get(app: Running, path: str = "/api/tags", **headers: str) -> httpx.Response:
    return await app.client.get(path, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def test_without_keys_any_key_will_do(app: Running) -> None:
    """SDKs can't be used without one, so people set something."""
    assert (await get(app)).status_code == 200
    assert (await get(app, authorization="Bearer sk-none")).status_code == 200


async def test_the_first_key_shuts_everybody_else_out(app: Running) -> None:
    _, token = app.services.gate.keys.create("laptop", ["infer"])
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {token}"}):
        answer = await get(app, **headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "shimpy keys create" in answer.json()["error"]
        was_sent = "Bearer" in headers.get("authorization", "")
        assert ("was sent" in answer.json()["error"]) == was_sent
    for headers in (
        {"authorization": f"Bearer {token}"},
        {"authorization": f"bearer  {token}"},
        {"x_api_key": token},
        {"authorization": "Bearer wrong", "x_api_key": token},
    ):
        assert (await get(app, **headers)).status_code == 200


async def test_a_revoked_key_is_shut_out_at_once(app: Running) -> None:
    keys = app.services.gate.keys
    keys.create("other", ["infer"])
    _, token = keys.create("laptop", ["infer"])
    assert (await get(app, x_api_key=token)).status_code == 200
    KeyFile(keys._path).revoke("laptop")
    assert (await get(app, x_api_key=token)).status_code == 401


async def test_the_last_key_does_not_open_an_exposed_daemon(tmp_path: Path) -> None:
    async with running_app(tmp_path, tmp_path, engine_argv=FAKE_ENGINE) as app:
        app.services.gate = replace(app.services.gate, is_exposed=True)
        assert (await get(app)).status_code == 401


async def test_a_damaged_key_file_opens_nothing(app: Running, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    answer = await get(app)
    assert answer.status_code == 401
    assert "can't be read" in answer.json()["error"]


async def test_a_key_may_do_what_its_scopes_say(app: Running) -> None:
    keys = app.services.gate.keys
    tokens = {scope: keys.create(scope, [scope])[1] for scope in ("infer", "manage", "admin")}
    expected = {
        "infer": {"GET /api/tags"},
        "manage": {"DELETE /api/delete"},
        "admin": {"GET /api/tags", "DELETE /api/delete"},
    }
    for scope, token in tokens.items():
        let_in = set()
        for request in ("GET /api/tags", "DELETE /api/delete"):
            method, path = request.split()
            answer = await app.client.request(method, path, headers={"x-api-key": token})
            if answer.status_code not in {401, 403}:
                let_in.add(request)
        assert let_in == expected[scope]


async def test_errors_are_in_the_client_s_dialect(app: Running) -> None:
    app.services.gate.keys.create("laptop", ["infer"])
    openai = await app.client.post("/v1/chat/completions", json={})
    assert openai.json()["error"]["type"] == "authentication_error"
    anthropic = await app.client.post("/v1/messages", json={})
    assert anthropic.json()["error"]["type"] == "authentication_error"


async def test_no_key_is_ever_logged(app: Running, capsys: pytest.CaptureFixture[str]) -> None:
    key, token = app.services.gate.keys.create("laptop", ["infer"])
    await get(app, x_api_key=token)
    await get(app, authorization="Bearer not-the-right-one")
    await get(app, f"/api/tags?key={token}", x_api_key=token)
    printed = "".join(capsys.readouterr())
    assert key.id in printed
    assert token not in printed
    assert "not-the-right-one" not in printed


async def test_signs_of_life_need_no_key(app: Running) -> None:
    app.services.gate.keys.create("laptop", ["infer"])
    for path in ("/", "/ready"):
        assert (await get(app, path)).status_code == 200


def test_every_route_s_scope_is_what_it_should_be() -> None:
    """What changes the disk needs manage; a route that nobody thought of does, too."""
    needs: dict[str | None, set[str]] = {}
    for route in all_routes():
        needs.setdefault(scope_of(route.method, route.path), set()).add(route.path)
    assert needs[None] <= {"/", "/health", "/v1/health", "/ready"}
    assert needs.get("admin", set()) == {"/api/reload", "/diag"}
    for path in ("/api/delete", "/api/create", "/api/copy", "/api/blobs/{digest}"):
        assert path in needs["manage"]
    assert not any(path.startswith("/v1/") for path in needs["manage"])
    assert scope_of("POST", "/api/something-new") == "manage"


@pytest.mark.slow
def test_a_unix_socket_knows_its_own_user(tmp_path: Path) -> None:
    """The daemon's user needs no key there, keys or not."""
    path = tmp_path / "s.sock"
    models = tmp_path / "models"
    models.mkdir()
    KeyFile(tmp_path / "state" / "keys.json").create("laptop", ["infer"])
    with running_daemon(tmp_path, models, "--bind", f"unix:{path}") as daemon:
        assert daemon.url == f"unix:{path}"
        done = daemon.shimpy("list")
        assert done.returncode == 0, done.stderr
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            # No page can reach it, so any Host will do.
            assert client.get("http://any.example/api/tags").status_code == 200
            assert client.delete("http://any.example/api/delete").status_code == 400
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_unix_socket_lets_others_infer_only(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    path = tmp_path / "s.sock"
    with running_daemon(tmp_path, models, "--bind", f"unix:{path}"):
        for folder in path.parents:
            if folder.stat().st_uid == 0 and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        # As an administrator may: who can open it is the file's to say.
        path.chmod(0o666)
        script = f"""
import os, socket
os.setgid(65534), os.setuid(65534)
for head in ("GET /api/tags", "DELETE /api/delete"):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect({str(path)!r})
        sock.sendall(f"{{head}} HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
        print(sock.recv(64).split()[1].decode())
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30
        )
    assert done.stdout.split() == ["200", "401"], done.stderr


@pytest.mark.slow
def test_a_socket_left_by_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    path = tmp_path / "s.sock"
    for _ in range(2):
        with running_daemon(tmp_path, models, "--bind", f"unix:{path}") as daemon:
            daemon.process.kill()
            daemon.process.wait()
        assert path.exists()


@pytest.mark.slow
def test_other_machines_are_let_in_with_a_key_only(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    argv = [sys.executable, "-m", "shimpy", "serve", "--bind", "0.0.0.0:0"]
    env = {**os.environ, "SHIMPY_HOME": str(tmp_path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "there is no API key: make one with `shimpy keys create`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_exposed_daemon_demands_its_key(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    _, token = KeyFile(tmp_path / "state" / "keys.json").create("laptop", ["infer"])
    with running_daemon(tmp_path, models, "--bind", "0.0.0.0:0") as daemon:
        url = daemon.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        assert httpx.get(f"{url}/api/tags", trust_env=False).status_code == 401
        daemon.env["SHIMPY_API_KEY"] = token
        assert daemon.shimpy("list").returncode == 0


@pytest.mark.slow
def test_insecure_lets_everybody_in_and_says_so(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    flags = ("--bind", "0.0.0.0:0", "--insecure", "on")
    with running_daemon(tmp_path, models, *flags) as daemon:
        url = daemon.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        assert httpx.get(f"{url}/api/tags", trust_env=False).status_code == 200
        assert "open_to_everybody" in daemon.log.read_text()


def test_a_file_in_the_socket_s_place_is_left_alone(tmp_path: Path) -> None:
    from shimpy.server.listening import _open_unix

    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match="can't listen on"):
        _open_unix(path)
    assert path.read_text() == "mine"
