"""A client of the daemon's HTTP API, for the command line and for scripts.

    with Client(url) as client:
        for chunk in client.generate({"model": "demo", "prompt": "def f("}):
            print(chunk["response"], end="")

The wire is Ollama's: dictionaries as docs/api.md describes them.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlencode

import httpx

from shimpy.config import client_key
from shimpy.errors import (
    ERROR_CODE_HEADER,
    DaemonError,
    InvalidNameError,
    InvalidOptionError,
    NotFoundError,
    ShimpyError,
    UnreachableError,
)
from shimpy.values import UNIX

# A model may take minutes to load before the first byte; connecting to a daemon does not.
_TIMEOUT = httpx.Timeout(None, connect=5.0)
_HTTP_OK = 200
_HTTP_ERROR = 400
_HTTP_NOT_FOUND = 404
# The caller's own mistakes, which are the same ones whoever finds them.
_MISTAKES = {kind.code: kind for kind in (InvalidNameError, InvalidOptionError)}


class Client:
    """A connection to the daemon at `url` (http, https, or unix:/path); not thread-safe."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        """`key` is an API key; None: that of SHIMPY_API_KEY, if there is one."""
        self.url = url
        key = client_key() if key is None else key
        path = url.removeprefix(UNIX) if url.startswith(UNIX) else None
        self._http = httpx.Client(
            # The name is sent as the Host and leads nowhere.
            base_url=url if path is None else "http://localhost",
            timeout=_TIMEOUT,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            # No proxy: the daemon is on this machine or named on purpose.
            trust_env=False,
            # The system's own authorities, and what SSL_CERT_FILE names.
            verify=ssl.create_default_context() if url.startswith("https:") else True,
            transport=None if path is None else httpx.HTTPTransport(uds=path),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def version(self) -> str:
        """Return the daemon's version; "": what answers is not shimpy, but like it.

        Raises:
            UnreachableError: nothing answers.
        """
        return str(self._call("GET", "/api/version").get("shimpy", ""))

    def models(self) -> list[dict[str, Any]]:
        """Return all models that the daemon knows, the broken ones too."""
        return list(self._call("GET", "/api/models")["models"])

    def ps(self) -> dict[str, Any]:
        """Return the loaded models, those that wait or are held back, and the last to leave."""
        return self._call("GET", "/api/ps")

    def diagnosis(self) -> dict[str, Any]:
        """Return versions, devices, harmless settings, problems, and what is loaded."""
        return self._call("GET", "/diag")

    def events(self, *, since: str = "", follow: bool = True) -> Iterator[dict[str, Any]]:
        """Yield what is loaded, unloaded and evicted, until the daemon stops.

        Args:
            since: first what happened since then: "10m" ago, or seconds since the epoch.
            follow: False: end with what has happened.
        """
        query = {"follow": str(follow).lower()} | ({"since": since} if since else {})
        for line in self._lines("GET", f"/api/events?{urlencode(query)}"):
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))

    def show(self, model: str, *, verbose: bool = False) -> dict[str, Any]:
        """Return all that is known of one model."""
        return self._call("POST", "/api/show", {"model": model, "verbose": verbose})

    def plan(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the placement that the daemon would choose."""
        return self._call("POST", "/api/plan", request)

    def catalog(self) -> list[dict[str, Any]]:
        """Return the models that can be pulled by a short name."""
        return list(self._call("GET", "/api/catalog")["models"])

    def pull(self, model: str, *, force: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the lines of /api/pull as they come, "success" with the model's name last."""
        return self._stream("/api/pull", {"model": model, "force": force})

    def generate(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of /api/generate as they come."""
        return self._stream("/api/generate", request)

    def chat(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of /api/chat as they come."""
        return self._stream("/api/chat", request)

    def load(
        self,
        model: str,
        keep_alive: float | str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a model as `options` want it (num_ctx, num_gpu), and keep it for `keep_alive`."""
        request: dict[str, Any] = {"model": model, "options": options or {}}
        if keep_alive is not None:
            request["keep_alive"] = keep_alive
        self._call("POST", "/api/generate", request)

    def unload(self, model: str) -> None:
        """Unload a model once its last request ends."""
        self._call("POST", "/api/generate", {"model": model, "keep_alive": 0})

    def pin(self, model: str, *, pinned: bool) -> dict[str, Any]:
        """Keep a model loaded once it is, or let it go again; return how it stands."""
        word = "pin" if pinned else "unpin"
        return self._call("POST", f"/api/models/{quote(model, safe='')}/{word}")

    def delete(self, model: str) -> None:
        """Remove a model of the store."""
        self._call("DELETE", "/api/delete", {"model": model})

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        self._call("POST", "/api/copy", {"source": source, "destination": destination})

    def change_settings(
        self, model: str, values: Mapping[str, Any], unset: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Set and unset what lasts about a model; return all that is set."""
        return self._call(
            "POST", "/api/settings", {"model": model, "set": values, "unset": list(unset)}
        )

    def create(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the statuses of /api/create as they come."""
        return self._stream("/api/create", request)

    def has_blob(self, digest: str) -> bool:
        """Return whether a file was uploaded already."""
        try:
            return self._http.head(f"/api/blobs/{digest}").is_success
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def upload_blob(self, digest: str, chunks: Iterable[bytes], n_bytes: int) -> None:
        """Upload a file, for a create to name."""
        try:
            response = self._http.post(
                f"/api/blobs/{digest}",
                content=chunks,
                headers={"Content-Length": str(n_bytes)},
            )
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code >= _HTTP_ERROR:
            raise _error_of(self.url, response)

    def collect_garbage(
        self, *, everything: bool = False, prefixes: bool = False
    ) -> dict[str, Any]:
        """Remove what no model needs; what is young only if `everything`.

        `prefixes`: and the KV caches of prompts that are kept for unloaded models.
        """
        return self._call("POST", "/api/gc", {"all": everything, "prefixes": prefixes})

    def verify(self, models: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield progress and findings of /api/verify as they come."""
        return self._stream("/api/verify", {"models": list(models)})

    def reload(self) -> dict[str, Any]:
        """Let the daemon read its config again; return what has changed."""
        return self._call("POST", "/api/reload")

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code >= _HTTP_ERROR:
            raise _error_of(self.url, response)
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for line in self._lines("POST", path, body):
            chunk = json.loads(line)
            if "error" in chunk:
                raise DaemonError(str(chunk["error"]), status=_HTTP_OK)
            yield chunk

    def _lines(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[str]:
        try:
            with self._http.stream(method, path, json=body) as response:
                if response.status_code >= _HTTP_ERROR:
                    response.read()
                    raise _error_of(self.url, response)
                yield from response.iter_lines()
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.TransportError as error:
            raise DaemonError(
                f"the daemon at {self.url} broke off in the middle of its answer ({error}); "
                "its log says why"
            ) from error

    def _unreachable(self, error: Exception) -> UnreachableError:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return UnreachableError(
                f"the certificate of {self.url} is not trusted here ({error}); SSL_CERT_FILE may "
                "name it, or that of who signed it"
            )
        return UnreachableError(
            f"no shimpy daemon answers at {self.url} ({error}); "
            "start one with `shimpy serve`, or set SHIMPY_HOST to where it runs"
        )


def _error_of(url: str, response: httpx.Response) -> ShimpyError:
    status = response.status_code
    try:
        message = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        text = " ".join(response.content[:200].decode(errors="replace").split())
        return DaemonError(
            f"what answers at {url} is no shimpy daemon of this version: status {status}"
            + (f", {text!r}" if text else "")
            + "; SHIMPY_HOST names where the daemon is",
            status=status,
        )
    if status == _HTTP_NOT_FOUND:
        return NotFoundError(message)
    mistake = _MISTAKES.get(response.headers.get(ERROR_CODE_HEADER, ""))
    if mistake is not None:
        return mistake(message)
    return DaemonError(message, status=status)
