from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimpy.server.errors import ForbiddenError
from shimpy.server.guard import Guard, cors_headers

ANY = "0.0.0.0"  # noqa: S104 - nothing is bound here
# The machine may be busy with other tests.
busy = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _lets_in(guard: Guard, host: str | None, origin: str | None = None) -> bool:
    try:
        guard.check(host=host, origin=origin)
    except ForbiddenError:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    [
        None,
        "localhost:11435",
        "LOCALHOST",
        "127.0.0.1:11435",
        "127.0.0.2",
        "[::1]:11435",
        "[::1]",
        "shimpy.localhost:80",
        "0.0.0.0:11435",
        "localhost.",
    ],
)
def test_loopback_takes_its_own_names(host: str | None) -> None:
    assert _lets_in(Guard(host="127.0.0.1"), host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:11435",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.0.4:11435",
        "[fe80::1]",
        "[",
        "a b",
        "@",
        "evil.example@localhost.evil",
    ],
)
def test_loopback_refuses_foreign_names(host: str) -> None:
    """A name that an attacker owns can be made to resolve to 127.0.0.1."""
    assert not _lets_in(Guard(host="127.0.0.1"), host)


def test_a_network_address_takes_any_host() -> None:
    """Which names lead to this machine is not known; keys protect it there."""
    assert _lets_in(Guard(host=ANY), "gpu-box.lan:11435")
    assert _lets_in(Guard(host="192.168.0.4"), "gpu-box.lan:11435")


@pytest.mark.parametrize("host", ["127.0.0.1", ANY, "::1"])
@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:8080", True),
        ("app://obsidian.md", True),
        ("tauri://localhost", True),
        ("vscode-webview://1abcd", True),
        ("file://", True),
        ("null", False),
        ("", False),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://evil.example/?localhost", False),
        ("http://[", False),
    ],
)
def test_origins(host: str, origin: str, expected: bool) -> None:
    assert _lets_in(Guard(host=host), "localhost", origin) == expected


@pytest.mark.parametrize(
    ("origins", "origin", "expected"),
    [
        (("https://chat.example",), "https://chat.example", True),
        (("https://chat.example",), "https://CHAT.example", True),
        (("https://chat.example",), "http://chat.example", False),
        (("https://chat.example",), "https://chat.example:8443", False),
        (("https://chat.example",), "https://a.chat.example", False),
        (("https://chat.example",), "https://chat.example.evil.example", False),
        (("*",), "https://evil.example", True),
        (("*",), "null", False),
        (("chrome-extension://*",), "chrome-extension://abcdefgh", True),
        (("chrome-extension://*",), "moz-extension://abcdefgh", False),
        (("https://*.chat.example",), "https://a.chat.example", True),
        (("https://*.chat.example",), "https://achat.example", False),
        (("https://*.chat.example",), "https://a.chat.example.evil.example", False),
    ],
)
def test_listed_origins_are_let_in(
    origins: tuple[str, ...], origin: str, *, expected: bool
) -> None:
    guard = Guard(host="127.0.0.1", origins=origins)
    assert _lets_in(guard, "localhost", origin) == expected


def test_a_proxy_of_a_listed_origin_may_pass_its_name_on() -> None:
    guard = Guard(host="127.0.0.1", origins=("https://chat.example",))
    assert _lets_in(guard, "chat.example:443")
    assert not _lets_in(guard, "evil.example")


def test_the_bind_address_is_its_own_origin() -> None:
    guard = Guard(host="192.168.0.4")
    assert guard.allows_origin("http://192.168.0.4:11435")
    assert not guard.allows_origin("http://192.168.0.5:11435")


@busy
@given(st.text(), st.text())
def test_any_text_is_decided(host: str, origin: str) -> None:
    _lets_in(Guard(host="127.0.0.1"), host, origin)


def test_a_preflight_names_methods_and_the_wanted_headers() -> None:
    headers = cors_headers("http://localhost:3000", "content-type, authorization")
    assert headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert headers["Access-Control-Allow-Headers"] == "content-type, authorization"
    assert "Access-Control-Allow-Methods" not in cors_headers("app://x", None)
