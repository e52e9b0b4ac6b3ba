from __future__ import annotations

from collections.abc import Iterator

import pytest

from shimpy.errors import NotFoundError, RemoteError, UnsupportedError
from shimpy.registry import web as web_module
from shimpy.registry.ollama_hub import fetch_model
from shimpy.registry.reference import UrlReference, parse_reference
from shimpy.registry.remote import TransientError
from shimpy.registry.web import MAX_REDIRECTS, Web, check_hop
from tests.hub_server import Fault, HubServer
from tests.hubs import hub

__all__ = ["hub"]


@pytest.fixture
def web() -> Iterator[Web]:
    client = Web()
    yield client
    client.close()


def url(server: HubServer, name: str) -> UrlReference:
    return UrlReference(url=f"{server.url}/files/{name}")


def read(web: Web, address: str) -> bytes:
    return web.read(address, accept="*/*", most_bytes=1000)


def test_redirects_are_followed(hub: HubServer, web: Web) -> None:
    hub.plain["x.gguf"] = b"GGUF"
    hub.redirects["a.gguf"] = "b.gguf"
    hub.redirects["b.gguf"] = f"{hub.storage_url}/files/x.gguf"
    assert web.describe(url(hub, "a.gguf")).size_bytes == 4


def test_redirects_without_end_are_not(hub: HubServer, web: Web) -> None:
    hub.redirects["a.gguf"] = "a.gguf"
    with pytest.raises(RemoteError, match=f"more than {MAX_REDIRECTS} times"):
        web.describe(url(hub, "a.gguf"))
    assert hub.count("file") == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    ("first", "target", "said"),
    [
        ("https://example.com/x", "http://example.com/x", "only https"),
        ("https://example.com/x", "file:///etc/passwd", "only https"),
        ("http://example.com/x", "ftp://example.com/x", "from http"),
        ("https://8.8.8.8/x", "https://127.0.0.1/x", "own network"),
        ("http://8.8.8.8/x", "http://169.254.169.254/latest/meta-data", "own network"),
        ("http://8.8.8.8/x", "http://[::1]:11435/api/delete", "own network"),
        ("http://8.8.8.8/x", "http://10.0.0.1/x", "own network"),
    ],
)
def test_a_server_may_not_lead_anywhere(first: str, target: str, said: str) -> None:
    with pytest.raises(RemoteError, match=said):
        check_hop(first, target)


@pytest.mark.parametrize(
    ("first", "target"),
    [
        ("http://127.0.0.1:1/x", "http://localhost:2/x"),
        ("http://8.8.8.8/x", "https://8.8.4.4/x"),
        ("http://10.0.0.1/x", "http://8.8.8.8/x"),
        ("https://8.8.8.8/x", "https://no-such-host.invalid/x"),
    ],
)
def test_a_server_may_lead_on(first: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = web_module.socket.getaddrinfo

    def known(host: str, port: object, **options: int) -> object:
        if host.endswith(".invalid"):
            raise OSError
        return lookup(host, port, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(web_module.socket, "getaddrinfo", known)
    check_hop(first, target)


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (404, NotFoundError, "nothing there"),
        (410, NotFoundError, "nothing there"),
        (403, RemoteError, "may want a login"),
        (418, RemoteError, "418"),
        (503, TransientError, "503"),
    ],
)
def test_refusals_are_told(
    hub: HubServer, web: Web, status: int, error: type[Exception], said: str
) -> None:
    hub.plain["x.gguf"] = b"GGUF"
    hub.faults = [Fault(where="file", status=status)]
    with pytest.raises(error, match=said):
        web.describe(url(hub, "x.gguf"))


def test_a_host_that_does_not_answer_may_do_so_later(web: Web) -> None:
    with pytest.raises(TransientError):
        web.describe(UrlReference(url="http://127.0.0.1:1/x.gguf"))


def test_a_small_answer_that_is_large_is_refused(hub: HubServer, web: Web) -> None:
    hub.plain["x.gguf"] = b"x" * 2000
    with pytest.raises(RemoteError, match="more than 1000 bytes"):
        read(web, f"{hub.url}/files/x.gguf")


# --- Ollama's registry ------------------------------------------------------------------------


def ollama(server: HubServer, *layers: tuple[str, bytes]) -> None:
    server.ollama["library/tiny:1b"] = list(layers)


def fetch(server: HubServer, web: Web, name: str = "tiny:1b") -> object:
    reference = parse_reference(f"ollama:http://127.0.0.1:{server.port}/library/{name}")
    return fetch_model(web, reference)  # type: ignore[arg-type]


def test_a_models_layers_become_files_and_settings(hub: HubServer, web: Web) -> None:
    ollama(
        hub,
        ("model", b"GGUF model"),
        ("projector", b"GGUF projector"),
        ("params", b'{"temperature": 0.5, "stop": ["x"]}'),
        ("system", b"Be kind."),
        ("template", b"{{ .Prompt }}"),
        ("license", b"MIT"),
    )
    model = fetch(hub, web)
    assert [file.size_bytes for file in model.files] == [10]  # type: ignore[attr-defined]
    assert model.projector.size_bytes == 14  # type: ignore[attr-defined]
    settings = model.settings  # type: ignore[attr-defined]
    assert settings.parameters == {"temperature": 0.5, "stop": ["x"]}
    assert (settings.system, settings.template) == ("Be kind.", "{{ .Prompt }}")
    assert settings.license == "MIT"
    with model.files[0].open(0, None) as body:  # type: ignore[attr-defined]
        assert b"".join(body.chunks) == b"GGUF model"


def test_a_model_that_is_not_there_is_named(hub: HubServer, web: Web) -> None:
    with pytest.raises(NotFoundError, match=r"no model ollama:.*nope:latest"):
        fetch(hub, web, "nope")


def test_a_model_with_an_adapter_is_not_half_used(hub: HubServer, web: Web) -> None:
    ollama(hub, ("model", b"GGUF"), ("adapter", b"GGUF"))
    with pytest.raises(UnsupportedError, match="LoRA"):
        fetch(hub, web)


def test_a_model_without_a_file_can_not_be_pulled(hub: HubServer, web: Web) -> None:
    ollama(hub, ("params", b"{}"))
    with pytest.raises(NotFoundError, match="no GGUF file"):
        fetch(hub, web)


def test_a_setting_that_comes_damaged_is_asked_for_again(hub: HubServer, web: Web) -> None:
    ollama(hub, ("model", b"GGUF"), ("system", b"Be kind."))
    hub.faults = [Fault(flip=True)]
    with pytest.raises(TransientError, match="damaged"):
        fetch(hub, web)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"<html>", "no manifest"),
        (
            b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "../x"}]}',
            "invalid digest",
        ),
    ],
)
def test_a_manifest_that_makes_no_sense_is_told(
    hub: HubServer, web: Web, manifest: bytes, said: str
) -> None:
    hub.broken_manifest = manifest
    with pytest.raises(RemoteError, match=said):
        fetch(hub, web)
