"""Frames: a message as msgpack behind its length, and back.

A frame is a 4-byte little-endian length and that many bytes. A Decoder takes bytes as they
come and gives whole messages; it never holds more than one frame over what it was fed.
"""

from __future__ import annotations

import struct
from typing import Generic, TypeVar

import msgspec

from shimpy.errors import ProtocolError
from shimpy.protocol.messages import ToDaemon, ToWorker

MAX_FRAME_BYTES = 256 * 1024 * 1024

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


def encode_frame(message: ToWorker | ToDaemon) -> bytes:
    """Return the frame of a message.

    Raises:
        ProtocolError: the frame would be longer than MAX_FRAME_BYTES.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a {type(message).__name__} message of {len(body)} bytes is over the limit of "
            f"{MAX_FRAME_BYTES}"
        )
    return _LENGTH.pack(len(body)) + body


class Decoder(Generic[M]):
    """Turns a byte stream into messages of one direction."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """Take bytes and return the messages that are now complete, in order.

        Raises:
            ProtocolError: a length over the limit, or a body that is no message.
        """
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(
                    f"a frame claims {length} bytes; the limit is {MAX_FRAME_BYTES}"
                )
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decode(bytes(self._buffer[start + _LENGTH.size : end])))
            start = end
        del self._buffer[:start]
        return messages

    def _decode(self, body: bytes) -> M:
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"a frame of {len(body)} bytes is no message: {error}") from error


def worker_decoder() -> Decoder[ToWorker]:
    """Return the decoder that a worker reads its channel with."""
    return Decoder(msgspec.msgpack.Decoder(ToWorker))


def daemon_decoder() -> Decoder[ToDaemon]:
    """Return the decoder that the daemon reads a worker's channel with."""
    return Decoder(msgspec.msgpack.Decoder(ToDaemon))
