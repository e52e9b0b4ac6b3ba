"""The daemon's end of a worker's socket: what waits, for whom, and until when."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from shimpy.protocol.messages import Delta, Prefilled, StepEvent
from shimpy.scheduler.channel import WorkerChannel
from shimpy.scheduler.worker import sooner_first


async def open_channel(
    on_data: Callable[[bytes], None] = lambda _data: None,
) -> tuple[WorkerChannel, socket.socket]:
    """Return a channel and the other end of its socket, which never blocks."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    return await WorkerChannel.open(ours, on_data), theirs


async def test_a_writer_waits_until_the_worker_reads() -> None:
    """Else all that is sent to a worker that does not read would be held in memory."""
    channel, theirs = await open_channel()
    await channel.wait_writable()
    sent = bytes(8 * 1024 * 1024)
    channel.write(sent)
    waiting = asyncio.ensure_future(channel.wait_writable())
    await asyncio.sleep(0)
    assert not waiting.done()
    loop, n_read = asyncio.get_running_loop(), 0
    while n_read < len(sent):
        n_read += len(await loop.sock_recv(theirs, 1024 * 1024))
    await waiting
    channel.close()
    theirs.close()
    await channel.wait_closed()


async def test_nobody_waits_for_a_worker_that_is_gone() -> None:
    channel, theirs = await open_channel()
    channel.write(bytes(8 * 1024 * 1024))
    theirs.close()
    await channel.wait_writable()
    await channel.wait_closed()
    channel.close()
    channel.write(b"nobody hears this")


async def test_the_last_word_is_heard_while_ours_can_still_be_said() -> None:
    """A worker that only stops talking is asked to end, which takes a channel."""
    heard: list[bytes] = []
    channel, theirs = await open_channel(heard.append)
    theirs.send(b"bye")
    theirs.shutdown(socket.SHUT_WR)
    await channel.wait_closed()
    assert heard == [b"bye"]
    channel.write(b"end")
    assert await asyncio.get_running_loop().sock_recv(theirs, 16) == b"end"
    channel.close()
    theirs.close()


async def test_what_can_not_be_taken_ends_it() -> None:
    def refuse(data: bytes) -> None:
        raise ValueError(data.decode())

    channel, theirs = await open_channel(refuse)
    theirs.send(b"nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        await channel.wait_closed()
    theirs.close()


def test_who_waits_for_a_first_token_is_told_before_all_others() -> None:
    """And what is told of one request stays in its order."""
    old, new = Delta(1, "old", 1), Delta(2, "new", 1)
    later: list[StepEvent] = [old, Prefilled(2, 9, 0), new]
    assert sooner_first(later) == [Prefilled(2, 9, 0), new, old]
    assert sooner_first([old, new]) == [old, new]
