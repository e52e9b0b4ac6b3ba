from __future__ import annotations

import socket

import pytest

from shimpy.errors import UserError
from shimpy.server.listening import open_sockets, split_bind, urls_of


@pytest.mark.parametrize(
    ("bind", "expected"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("box:1", ("box", 1))],
)
def test_bind_addresses_are_split(bind: str, expected: tuple[str, int]) -> None:
    assert split_bind(bind) == expected


async def test_a_free_port_is_told() -> None:
    (sock,) = await open_sockets("127.0.0.1", 0)
    with sock:
        assert urls_of([sock]) == [f"http://127.0.0.1:{sock.getsockname()[1]}"]


async def test_all_addresses_of_a_name_share_the_port() -> None:
    """Clients try ::1 and 127.0.0.1 for localhost, in this order or the other."""
    sockets = await open_sockets("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="the machine has no IPv6")
async def test_an_ipv6_url_has_brackets() -> None:
    try:
        (sock,) = await open_sockets("::1", 0)
    except UserError:
        pytest.skip("there is no ::1 here")
    with sock:
        assert urls_of([sock])[0].startswith("http://[::1]:")


async def test_a_port_in_use_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1 port {port}: another program"):
            await open_sockets("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
async def test_an_address_of_others_says_so(host: str) -> None:
    with pytest.raises(UserError, match="can't listen on"):
        await open_sockets(host, 0)
