"""A minimal WebSocket client for load generators: it needs little CPU, and checks nothing that a server does."""
# ruff: noqa: D102 - the callbacks of asyncio are described there

import asyncio
import struct
from typing import cast
from urllib.parse import urlsplit

_PING, _CLOSE, _PONG = 0x89, 0x88, 0x8A


def encode(text: str) -> bytes:
    """One text frame of a client. The masking key is zero, so the payload stands as it is."""
    payload = text.encode()
    if len(payload) < 126:  # noqa: PLR2004 - RFC 6455, section 5.2
        return struct.pack("!BBI", 0x81, 0x80 | len(payload), 0) + payload
    return struct.pack("!BBHI", 0x81, 0x80 | 126, len(payload), 0) + payload


class WebSocket(asyncio.Protocol):
    """One socket of one user. Subclasses implement `upgraded`, `received` and `lost`."""

    transport: asyncio.Transport

    def __init__(self, url: str, user: int) -> None:
        host, path = urlsplit(url)[1:3]
        self._upgrade = (
            f"GET {path}?userId={user} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
        self._received = b""
        self._upgraded = False
        self._reason = ""

    def upgraded(self, error: str | None) -> None:
        """The handshake is complete; `error` is the head of another response than 101."""
        raise NotImplementedError

    def received(self, payload: bytes) -> None:
        """The server has sent a text frame."""
        raise NotImplementedError

    def lost(self, reason: str) -> None:
        """The connection is closed. `reason`: `close` and the code, or an error of the system."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._upgrade)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost(self._reason or (type(exc).__name__ if exc else "end of stream"))

    def data_received(self, data: bytes) -> None:
        buffer = self._received + data if self._received else data
        if not self._upgraded:
            head, end, buffer = buffer.partition(b"\r\n\r\n")
            if not end:
                self._received = head
                return
            self._upgraded = True
            self.upgraded(None if b" 101 " in head[:20] else head.decode(errors="replace"))
        position, size = 0, len(buffer)
        while size - position >= 2:  # noqa: PLR2004 - the shortest frame
            length, start = buffer[position + 1], position + 2
            if length == 126:  # noqa: PLR2004 - RFC 6455, section 5.2
                length, start = int.from_bytes(buffer[start : start + 2], "big"), start + 2
            elif length == 127:  # noqa: PLR2004 - same
                length, start = int.from_bytes(buffer[start : start + 8], "big"), start + 8
            if start + length > size:
                break
            self._on_frame(buffer[position], buffer[start : start + length])
            position = start + length
        self._received = buffer[position:]

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == _PING:
            self.transport.write(struct.pack("!BBI", _PONG, 0x80 | len(payload), 0) + payload)
        elif kind == _CLOSE:
            self._reason = f"close {int.from_bytes(payload[:2], 'big')}"
            self.transport.close()
        else:
            self.received(payload)
