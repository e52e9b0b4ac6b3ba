"""A server that speaks the Hugging Face hub's HTTP API, and Ollama's, and fails on request.

It answers what huggingface_hub and a plain client ask for: `/api/models/...` with its files'
sizes and digests, `/<repo>/resolve/<revision>/<path>` that leads to a storage on another host
("localhost" instead of "127.0.0.1", so that a forwarded token would show), `/v2/...` of an Ollama
registry, and `/files/...` as any web server. Faults are put into a queue; each spoils one
matching request.

    python -m tests.hub_server FOLDER      serves FOLDER's files as the repository test/speed
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Where = Literal["api", "resolve", "storage", "file", "registry"]
_CHUNK = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What spoils one request.

    status: answer so, with `headers` and the JSON `body`.
    drop_after: break the connection behind so many bytes of the body.
    stall_after: send nothing behind so many bytes, until `HubServer.go_on`.
    end_after: end the body there as if it were whole (no Content-Length).
    shorter_by: the file is so many bytes shorter, and says so.
    ignore_range: send the whole file with a 200.
    etag: say this ETag (on the redirect, X-Linked-Etag).
    flip: change one byte of the body.
    """

    where: Where = "storage"
    path: str = ""
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    drop_after: int | None = None
    stall_after: int | None = None
    end_after: int | None = None
    shorter_by: int = 0
    ignore_range: bool = False
    etag: str | None = None
    flip: bool = False


@dataclass
class Seen:
    """A request that came."""

    where: Where
    method: str
    path: str
    range: str
    token: str
    # Bytes of the body that were sent.
    n_bytes: int = 0


@dataclass
class HostedFile:
    """A file with what the hub knows of it."""

    # Held, or mapped.
    data: bytes | mmap.mmap
    is_lfs: bool = True

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        digest = hashlib.sha1(b"blob %d\0" % len(self.data))  # noqa: S324 - as Git does
        digest.update(self.data)
        return digest.hexdigest()


@dataclass
class Repo:
    """A repository."""

    files: dict[str, HostedFile]
    license: str = "apache-2.0"
    is_gated: bool = False
    is_private: bool = False


class HubServer:
    """The server, in a thread of its own; its state may be changed between requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.plain: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        # "namespace/name:tag" to layers: media type's ending and data.
        self.ollama: dict[str, list[tuple[str, bytes]]] = {}
        # Sent in place of any manifest.
        self.broken_manifest = b""
        self.token = "hf_good"  # noqa: S105 - the one that it takes
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._released = asyncio.Event()
        self._stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        return f"http://localhost:{self.port}"

    def add(self, name: str, files: Mapping[str, bytes | Path], **settings: Any) -> Repo:
        """Host a repository."""
        hosted = {
            path: HostedFile(data if isinstance(data, bytes) else data.read_bytes())
            for path, data in files.items()
        }
        for file in hosted.values():
            # Hashed before anyone waits for an answer: clients' patience is short.
            _ = file.sha256, file.git_oid
        repo = self.repos[name] = Repo(hosted, **settings)
        return repo

    def count(self, where: Where) -> int:
        """How many requests of a kind came."""
        return sum(seen.where == where for seen in self.seen)

    def sent(self, where: Where = "storage") -> int:
        """How many bytes of bodies were sent for requests of a kind."""
        return sum(seen.n_bytes for seen in self.seen if seen.where == where)

    def wait_stalled(self, timeout: float = 20.0) -> None:
        """Wait until a request has stalled."""
        assert self._stalled.wait(timeout), "no request came as far as its stall"

    def go_on(self) -> None:
        """Let all that has stalled, or will, go on."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._released.set)

    # --- handlers ---------------------------------------------------------------------------

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/models/{org}/{repo}", self._model_info),
                web.get("/api/models/{org}/{repo}/revision/{revision}", self._model_info),
                web.get("/api/models/{org}/{repo}/tree/{revision}", self._tree),
                web.get("/v2/{ns}/{name}/manifests/{tag}", self._manifest),
                web.get("/v2/{ns}/{name}/blobs/{digest}", self._blob),
                web.get("/storage/{digest}", self._storage),
                web.get("/files/{name:.*}", self._file),
                web.get("/{org}/{repo}/resolve/{revision}/{path:.*}", self._resolve),
            ]
        )
        return app

    async def _model_info(self, request: web.Request) -> web.StreamResponse:
        name = f"{request.match_info['org']}/{request.match_info['repo']}"
        fault = self._fault("api", name)
        self._see("api", request)
        if fault is not None and fault.status:
            return _status(fault)
        repo = self.repos.get(name)
        if repo is None or (repo.is_private and not self._knows(request)):
            return self._no_repo(request)
        return web.json_response(
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": COMMIT,
                "private": repo.is_private,
                "gated": "manual" if repo.is_gated else False,
                "cardData": {"license": repo.license},
                "tags": ["gguf"],
                "downloads": 0,
                "likes": 0,
                "siblings": [_sibling(path, file) for path, file in repo.files.items()],
            }
        )

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        name = f"{request.match_info['org']}/{request.match_info['repo']}"
        self._see("api", request)
        repo = self.repos.get(name)
        if repo is None:
            return self._no_repo(request)
        return web.json_response(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(file.data),
                    "oid": file.git_oid,
                    "lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134},
                }
                for path, file in repo.files.items()
            ]
        )

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        name = f"{request.match_info['org']}/{request.match_info['repo']}"
        path = request.match_info["path"]
        fault = self._fault("resolve", path)
        self._see("resolve", request)
        if fault is not None and fault.status:
            return _status(fault)
        repo = self.repos.get(name)
        if repo is None or (repo.is_private and not self._knows(request)):
            return self._no_repo(request)
        if repo.is_gated and not self._knows(request):
            said = f"Access to model {name} is restricted. You must have access to it."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": said}
            return web.json_response({"error": said}, status=401, headers=headers)
        file = repo.files.get(path)
        if file is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return web.Response(status=404, headers=headers)
        headers = {"X-Repo-Commit": COMMIT}
        if not file.is_lfs:
            headers["ETag"] = f'"{file.git_oid}"'
            return await self._send(request, "resolve", file.data, headers, fault)
        etag = fault.etag if fault is not None and fault.etag is not None else file.sha256
        headers |= {
            "X-Linked-Size": str(len(file.data)),
            "X-Linked-Etag": f'"{etag}"',
            "ETag": f'"{etag}"',
            "Location": f"{self.storage_url}/storage/{file.sha256}",
        }
        return web.Response(status=302, headers=headers)

    async def _storage(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        fault = self._fault("storage", digest)
        data = self._by_digest(digest)
        # Not the digest: storages have marks of their own.
        return await self._send(request, "storage", data, {"ETag": '"5d41402a-2"'}, fault)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        fault = self._fault("file", name)
        if name in self.redirects:
            self._see("file", request)
            return web.Response(status=302, headers={"Location": self.redirects[name]})
        if name not in self.plain:
            return web.Response(status=404)
        data = self.plain[name]
        mark = hashlib.md5(data).hexdigest()  # noqa: S324 - as some servers do
        return await self._send(request, "file", data, {"ETag": f'"{mark}"'}, fault)

    async def _manifest(self, request: web.Request) -> web.StreamResponse:
        info = request.match_info
        self._see("registry", request)
        if self.broken_manifest:
            return web.Response(body=self.broken_manifest)
        layers = self.ollama.get(f"{info['ns']}/{info['name']}:{info['tag']}")
        if layers is None:
            errors = [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]
            return web.json_response({"errors": errors}, status=404)
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json"},
            "layers": [
                {
                    "mediaType": f"application/vnd.ollama.image.{kind}",
                    "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
                    "size": len(data),
                }
                for kind, data in layers
            ],
        }
        return web.Response(text=json.dumps(manifest), content_type="text/plain")

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        self._see("registry", request)
        digest = request.match_info["digest"].removeprefix("sha256:")
        location = f"{self.storage_url}/storage/{digest}"
        return web.Response(status=307, headers={"Location": location})

    # --- within -----------------------------------------------------------------------------

    def _by_digest(self, digest: str) -> bytes | mmap.mmap:
        files = [file for repo in self.repos.values() for file in repo.files.values()]
        files += [HostedFile(data) for layers in self.ollama.values() for _, data in layers]
        return next(file.data for file in files if file.sha256 == digest)

    async def _send(
        self,
        request: web.Request,
        where: Where,
        data: bytes | mmap.mmap,
        headers: dict[str, str],
        fault: Fault | None,
    ) -> web.StreamResponse:
        fault = fault or Fault()
        if fault.status:
            self._see(where, request)
            return _status(fault)
        size = len(data) - fault.shorter_by
        if fault.etag is not None:
            headers["ETag"] = f'"{fault.etag}"'
        start, end = 0, size
        http_range = request.http_range
        is_part = "Range" in request.headers and not fault.ignore_range
        if is_part:
            start = http_range.start or 0
            end = min(size, http_range.stop or size)
            if start >= size:
                self._see(where, request)
                return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        # A view: a mapped file is larger than memory.
        body = memoryview(data)[start:end]
        if fault.flip:
            body = memoryview(bytes(body[:-1]) + bytes([body[-1] ^ 1]))
        response = web.StreamResponse(status=206 if is_part else 200, headers=headers)
        if fault.end_after is None:
            response.content_length = len(body)
        else:
            body = body[: fault.end_after]
            response.enable_chunked_encoding()
        seen = self._see(where, request)
        await self._stream(request, response, body, fault, seen)
        return response

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        body: memoryview,
        fault: Fault,
        seen: Seen,
    ) -> None:
        """Send a body as far as the fault lets it."""
        await response.prepare(request)
        stops = [n for n in (fault.drop_after, fault.stall_after) if n is not None]
        try:
            while seen.n_bytes < len(body):
                start = seen.n_bytes
                end = min([start + _CHUNK, len(body), *(n for n in stops if n > start)])
                # Counted before it is sent, so that whoever has it finds it counted.
                seen.n_bytes = end
                await response.write(body[start:end])
                if fault.drop_after is not None and end >= fault.drop_after:
                    assert request.transport is not None
                    # What was written is to arrive; then the line is cut.
                    request.transport.close()
                    return
                if fault.stall_after is not None and end >= fault.stall_after:
                    self._stalled.set()
                    await self._released.wait()
            await response.write_eof()
        except ConnectionError:
            # The client left.
            pass

    def _fault(self, where: Where, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.where == where and fault.path in path:
                self.faults.remove(fault)
                return fault
        return None

    def _see(self, where: Where, request: web.Request) -> Seen:
        headers = request.headers
        seen = Seen(
            where,
            request.method,
            request.path,
            headers.get("Range", ""),
            headers.get("Authorization", ""),
        )
        self.seen.append(seen)
        return seen

    def _knows(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.token}"

    def _no_repo(self, request: web.Request) -> web.Response:
        """The hub does not tell strangers what is missing from what is private."""
        known = self._knows(request)
        said = "Repository not found" if known else "Invalid username or password."
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": said}
        return web.json_response({"error": said}, status=404 if known else 401, headers=headers)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Listen on a free port of the loopback address."""
        started = threading.Event()
        ends: asyncio.Event | None = None

        async def main() -> None:
            nonlocal ends
            ends = asyncio.Event()
            self._loop = asyncio.get_running_loop()
            runner = web.AppRunner(self.app(), handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = runner.addresses[0][1]
            started.set()
            await ends.wait()
            self._released.set()
            await runner.cleanup()

        thread = threading.Thread(target=asyncio.run, args=(main(),), name="hub")
        thread.start()
        assert started.wait(10)
        try:
            yield self
        finally:
            assert self._loop is not None
            assert ends is not None
            self._loop.call_soon_threadsafe(ends.set)
            thread.join(10)


def _status(fault: Fault) -> web.Response:
    return web.json_response(fault.body or {}, status=fault.status, headers=dict(fault.headers))


def _sibling(path: str, file: HostedFile) -> dict[str, Any]:
    sibling: dict[str, Any] = {
        "rfilename": path,
        "size": len(file.data),
        "blobId": file.git_oid,
    }
    if file.is_lfs:
        lfs = {"sha256": file.sha256, "size": len(file.data), "pointerSize": 134}
        sibling["lfs"] = lfs
    return sibling


if __name__ == "__main__":
    sys.exit("see tests/benchmarks/pull_speed.py")
