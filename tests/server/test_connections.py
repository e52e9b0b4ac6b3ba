"""Connections that bring nothing, lie, or are too many; and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from aiohttp import web

from shimpy.errors import UserError
from shimpy.server import bodies
from shimpy.server.app import make_app
from shimpy.server.connections import Connections, allow_files, http_logger
from shimpy.server.listening import open_sockets
from shimpy.server.tls import load_certificate, make_tls
from tests.daemon import running_daemon
from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_app(tmp_path, tmp_path, engine_argv=FAKE_ENGINE) as running:
        yield running


@asynccontextmanager
async def listening(
    app: Running, *, limit: int = 8, idle_s: float = 60.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Listen on another port as the daemon does; yields the port."""
    runner = web.AppRunner(
        make_app(app.services),
        handler_cancellation=True,
        keepalive_timeout=idle_s,
        logger=http_logger(),
        shutdown_timeout=0.1,
        lingering_time=0.1,
    )
    await runner.setup()
    connections = Connections(runner, limit=limit, tls=tls)
    sockets = await open_sockets("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    try:
        await connections.listen(sockets)
        yield port
        connections.stop_listening()
    finally:
        await runner.cleanup()


async def exchange(port: int, data: bytes, *, eof: bool = False) -> bytes:
    """Send bytes and return all that comes until the daemon hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if eof:
        writer.write_eof()
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_head_that_does_not_come_is_waited_for_no_longer(app: Running) -> None:
    async with listening(app, idle_s=0.2) as port:
        for head in (b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "):
            async with asyncio.timeout(20):
                assert await exchange(port, head) == b""


async def test_one_connection_too_many_is_told_and_hung_up_on(app: Running) -> None:
    async with listening(app, limit=2) as port:
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        head = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for _, writer in kept:
            writer.write(head)
        for reader, _ in kept:
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        refused = await exchange(port, b"")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"max_connections" in refused
        # Those inside are served all the same, and who leaves makes room.
        (reader, writer), (_, other) = kept
        await reader.readuntil(b"}")
        writer.write(head)
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        for one in (writer, other):
            one.close()
            await one.wait_closed()
        for _ in range(100):
            if b"200 OK" in await exchange(
                port, head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            ):
                return
        pytest.fail("no room was made")


HEAD = b"POST /api/show HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 100\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 1\r\n\r\n{}GET",
        HEAD + b"Content-Length: 9\r\nContent-Encoding: gzip\r\n\r\nnot gzip.",
    ],
    ids=["short", "cut", "no-number", "two", "both", "negative", "long", "not-gzip"],
)
async def test_a_body_that_lies_about_its_length_harms_nobody(
    app: Running, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async with listening(app) as port:
        async with asyncio.timeout(20):
            answer = await exchange(port, data, eof=True)
        status = answer[9:12]
        assert answer == b"" or status in {b"400", b"408"}, answer
        # The daemon goes on as if nothing had been.
        well = await exchange(
            port, b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        assert b"200 OK" in well
    assert "bug" not in capsys.readouterr().out


async def test_a_broken_upload_is_the_client_s_fault(app: Running) -> None:
    head = HEAD.replace(b"/api/show", b"/api/blobs/sha256:" + b"0" * 64)
    async with listening(app) as port, asyncio.timeout(20):
        answer = await exchange(port, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert answer[9:12] == b"400", answer


async def test_what_is_no_http_is_one_line_in_the_log(
    app: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port scanner must not fill the log with tracebacks."""
    async with listening(app) as port:
        answer = await exchange(port, b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        assert answer[9:12] == b"400", answer
    printed = "".join(capsys.readouterr())
    assert "bad_http" in printed
    assert "Traceback" not in printed


async def test_a_body_that_stops_coming_is_a_408(
    app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "READ_TIMEOUT_S", 0.1)
    async with listening(app) as port:
        async with asyncio.timeout(30):
            answer = await exchange(port, HEAD + b"Content-Length: 100\r\n\r\n{", eof=False)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_declared_length_over_the_limit_is_not_read(app: Running) -> None:
    length = app.services.config.max_body + 1
    async with listening(app) as port:
        async with asyncio.timeout(20):
            answer = await exchange(port, HEAD + b"Content-Length: %d\r\n\r\n{" % length)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_the_limit_of_files_is_raised_as_far_as_is_allowed() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        assert allow_files(100) == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 356
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def write_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(key)),
            *("-out", str(cert), "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def name_of(port: int) -> str:
    """The common name on the certificate that a new connection is shown."""
    pem = ssl.get_server_certificate(("127.0.0.1", port))
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-subject"],
        input=pem,
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout.rpartition("=")[2].strip()


@pytest.mark.slow
async def test_tls_with_a_certificate_that_is_renewed(app: Running, tmp_path: Path) -> None:
    first, second = (write_certificate(tmp_path, name) for name in ("first", "second"))
    tls = make_tls(*first)
    assert tls is not None
    async with listening(app, tls=tls) as port:
        verify = ssl.create_default_context(cafile=str(first[0]))
        async with httpx.AsyncClient(verify=verify, trust_env=False) as client:
            assert (await client.get(f"https://127.0.0.1:{port}/ready")).status_code == 200
        assert await asyncio.to_thread(name_of, port) == "first"
        load_certificate(tls, *second)
        assert await asyncio.to_thread(name_of, port) == "second"


def test_certificates_that_can_not_be_used_say_why(tmp_path: Path) -> None:
    one, other = (write_certificate(tmp_path, name) for name in ("one", "other"))
    with pytest.raises(UserError, match="belong together"):
        make_tls(one[0], None)
    with pytest.raises(UserError, match="can't use the certificate"):
        make_tls(one[0], other[1])
    with pytest.raises(UserError, match="No such file"):
        make_tls(tmp_path / "none", one[1])
    assert make_tls(None, None) is None


@pytest.mark.slow
def test_the_daemon_over_tls(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    cert, key = write_certificate(tmp_path, "box")
    flags = ("--tls-cert", str(cert), "--tls-key", str(key))
    with running_daemon(tmp_path, tmp_path / "models", *flags) as daemon:
        assert daemon.url.startswith("https://127.0.0.1:")
        assert "SSL_CERT_FILE" in daemon.shimpy("list").stderr
        daemon.env["SSL_CERT_FILE"] = str(cert)
        done = daemon.shimpy("list")
        assert done.returncode == 0, done.stderr


async def test_running_out_of_files_ends_nothing(app: Running) -> None:
    """The limit on connections is below it; should it be reached all the same, it passes."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with listening(app, limit=1000) as port:
        head = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert b"200 OK" in await exchange(port, head)
        hogs: list[socket.socket] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    hogs.append(socket.socket())
            # One for the client; none for the daemon's side of it.
            hogs.pop().close()
            client = socket.create_connection(("127.0.0.1", port))
            await asyncio.sleep(0)
        finally:
            for hog in hogs:
                hog.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        with client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, head)
            async with asyncio.timeout(20):
                assert b"200 OK" in await loop.sock_recv(client, 4096)
