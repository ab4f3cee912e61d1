"""A low-level WebSocket peer: the test writes every byte, and decides when to read."""

import asyncio
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from imstream.user_ids import UserId
from tests.support.peer import check_close
from tests.support.schemas import check_frame
from tests.support.users import query
from tests.support.waiting import SLOW

LIMIT = 10.0 * SLOW
"""Maximum wait for one read in seconds."""

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

NORMAL_CLOSURE = 1000
"""The code of a close that the server only answers."""

FIN = 0x80
RSV1 = 0x40
MASKED = 0x80


def frame(
    opcode: int, payload: bytes = b"", *, first: int = FIN, mask: bool = True, length: int | None = None
) -> bytes:
    """Build one frame (RFC 6455, section 5.2).

    Args:
        opcode: The opcode.
        payload: The payload.
        first: The bits of the first byte beside the opcode: FIN and the reserved ones.
        mask: Whether it is masked, as a client's frames must be.
        length: A false length, if any.
    """
    size = len(payload) if length is None else length
    if size < 126:
        head = struct.pack("!BB", first | opcode, (MASKED if mask else 0) | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first | opcode, (MASKED if mask else 0) | 126, size)
    else:
        head = struct.pack("!BBQ", first | opcode, (MASKED if mask else 0) | 127, size)
    if not mask:
        return head + payload
    key = os.urandom(4)
    pad = (key * (len(payload) // 4 + 1))[: len(payload)]
    return head + key + (int.from_bytes(payload) ^ int.from_bytes(pad)).to_bytes(len(payload))


def fragments(parts: Iterable[bytes], opcode: int = TEXT, *, end: bool = True) -> bytes:
    """Build one message with a frame per part; without `end`, the last frame has no FIN."""
    pieces = list(parts)
    last = len(pieces) - 1
    return b"".join(
        frame(opcode if n == 0 else CONTINUATION, part, first=FIN if end and n == last else 0)
        for n, part in enumerate(pieces)
    )


class RawSocket:
    """A TCP connection.

    Attributes:
        texts: The JSON of all text frames read so far.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.texts: list[dict[str, Any]] = []
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()

    async def send(self, data: bytes, limit: float = LIMIT) -> None:
        """Send bytes as they are."""
        async with asyncio.timeout(limit):
            await self._loop.sock_sendall(self.sock, data)

    async def send_frame(self, **fields: Any) -> None:  # noqa: ANN401 - any field, right or wrong
        """Send a well-formed text frame with JSON."""
        await self.send(frame(TEXT, json.dumps(fields).encode()))

    async def upgrade(
        self, path: str = "/ws", headers: Iterable[str] = (), *, also: bytes = b"", encoding: str = "utf-8"
    ) -> bytes:
        """Request the upgrade and read the head of the response; `also` is sent in the same packet."""
        lines = [
            f"GET {path} HTTP/1.1",
            "Host: 127.0.0.1",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            *headers,
        ]
        await self.send("\r\n".join([*lines, "", ""]).encode(encoding) + also)
        return await self.head()

    async def head(self) -> bytes:
        """Read the head of an HTTP response, or everything up to the end of the connection."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if not await self._read():
                return bytes(self._buffer)
        head = bytes(self._buffer[: end + 4])
        del self._buffer[: end + 4]
        return head

    async def body(self, head: bytes) -> bytes:
        """Read the body of an HTTP response by the Content-Length in its head."""
        size = next(
            int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-length:")
        )
        while len(self._buffer) < size:
            assert await self._read(), "the connection ended within the body"
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        return body

    async def next_frame(self, limit: float = LIMIT) -> tuple[int, bytes] | None:
        """Read the next frame as opcode and payload; None at the end of the connection."""
        while (found := self._parse()) is None:
            if not await self._read(limit):
                return None
        opcode, payload = found
        if opcode == TEXT:
            self.texts.append(json.loads(payload))
            check_frame(self.texts[-1])
        return opcode, payload

    async def until(self, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any field
        """Skip to the next text frame with these fields."""
        while (found := await self.next_frame()) is not None:
            if found[0] == TEXT and all(self.texts[-1].get(name) == value for name, value in fields.items()):
                return self.texts[-1]
        raise AssertionError(f"the connection ended without {fields}: {self.texts}")

    async def close_code(self, limit: float = LIMIT) -> int | None:
        """Read up to the close frame and return its code; None if the connection breaks. Checks a server's close."""
        while (found := await self.next_frame(limit)) is not None:
            if found[0] == CLOSE:
                code: int = struct.unpack("!H", found[1][:2])[0]
                if code != NORMAL_CLOSURE:
                    check_close(code, found[1][2:].decode(), self.texts)
                return code
        return None

    async def ended(self, limit: float = LIMIT) -> bytes:
        """Read to the end of the connection."""
        while await self._read(limit):
            pass
        return bytes(self._buffer)

    def finish(self) -> None:
        """Close the sending side (FIN); the peer may have closed the connection already."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Break the connection (RST)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def _read(self, limit: float = LIMIT) -> bool:
        try:
            async with asyncio.timeout(limit):
                data = await self._loop.sock_recv(self.sock, 65536)
        except ConnectionError:
            return False
        self._buffer += data
        return bool(data)

    def _parse(self) -> tuple[int, bytes] | None:
        data = self._buffer
        if len(data) < 2:
            return None
        size, begin = data[1] & 0x7F, 2
        for mark, width in ((126, 2), (127, 8)):
            if size == mark:
                if len(data) < 2 + width:
                    return None
                size, begin = int.from_bytes(data[2 : 2 + width]), 2 + width
                break
        if len(data) < begin + size:
            return None
        opcode, payload = data[0] & 0x0F, bytes(data[begin : begin + size])
        del data[: begin + size]
        return opcode, payload


@asynccontextmanager
async def raw_socket(port: int, *, narrow: bool = False) -> AsyncIterator[RawSocket]:
    """Connect to a port of 127.0.0.1. A `narrow` connection that is not read blocks its sender after about 50 KB.

    Others block it after up to 4 MB, because Linux buffers a number of segments, and those of loopback are large.
    """
    sock = socket.socket()
    if narrow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    sock.setblocking(False)  # noqa: FBT003 - the only parameter
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        yield RawSocket(sock)
    finally:
        sock.close()


@asynccontextmanager
async def raw_user(port: int, user: UserId, *, narrow: bool = False) -> AsyncIterator[RawSocket]:
    """Connect, upgrade and log in."""
    async with raw_socket(port, narrow=narrow) as raw:
        head = await raw.upgrade(f"/ws?{query(user)}")
        assert head.startswith(b"HTTP/1.1 101 "), head
        await raw.send_frame(msgType="INIT", userId=user)
        await raw.until(msgType="INIT")
        yield raw
