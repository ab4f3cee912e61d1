"""A connection that can be held: what is sent meanwhile is then read together."""

import asyncio
import os
from typing import cast

RECEIVE_BUFFER = 32 * 1024  # bytes that are received in one turn of the event loop, and of a body that nobody reads
_LAST_CHUNK = b"0\r\n\r\n"  # of a body in chunks (RFC 9112, section 7.1)


class HeldConnection(asyncio.Protocol):
    """A protocol whose subclass passes data to `gather` while `gathered` is a list.

    The event loop then does not watch the socket: data waits in the kernel, and `release` reads it with one system
    call, which is cheaper than being woken. Only its transport can read a TLS connection: there it gathers.
    """

    transport: asyncio.Transport
    wire: asyncio.Transport
    """The transport below TLS, or the same: reading is paused there. uvloop's of TLS would go on, and lose what it has
    read when the server closes."""

    def __init__(self) -> None:
        self.gathered: list[bytes] | None = None
        """Received since `hold`; None: it is not held."""
        self._size = 0  # bytes gathered
        self._socket: int | None = None  # its descriptor; None: only the transport can read, or is to find the end
        self._is_polled = False  # the transport does not read, because `release` does
        self._is_reset = False  # `release` has found an error, and the transport finds the end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.transport = self.wire = cast("asyncio.Transport", transport)
        self._socket = readable_socket(transport)

    def hold(self) -> None:
        """Receive nothing until `release`, unless it is large, or the end of a body."""
        self.gathered, self._size = [], 0
        if self._socket is not None and not self._is_polled:
            self._is_polled = True
            self.pause_reading()

    def release(self) -> None:
        """Receive what was sent meanwhile, which may be nothing, and continue unless that holds it again."""
        gathered, self.gathered = self.gathered, None
        if gathered is None:
            return
        gathered.append(self._poll())
        self.data_received(b"".join(gathered))
        if self.gathered is None:
            self.stop_holding()

    def gather(self, data: bytes) -> bytes | None:
        """Keep data, or return all that is kept if it is to be parsed now."""
        assert self.gathered is not None  # noqa: S101 - it is held
        self.gathered.append(data)
        self._size += len(data)
        if self._size < RECEIVE_BUFFER and not data.endswith(_LAST_CHUNK):
            return None
        data, self.gathered = b"".join(self.gathered), None
        return data

    def stop_holding(self) -> None:
        """Drop what is kept, and receive again."""
        self.gathered, self._is_polled = None, False
        self.resume_reading()

    def pause_reading(self) -> None:
        """Receive nothing until `resume_reading`."""
        if not self.transport.is_closing():
            self.wire.pause_reading()

    def resume_reading(self) -> None:
        """Receive again, unless `release` does."""
        if not self._is_polled and not self.transport.is_closing():
            self.wire.resume_reading()

    def abort(self) -> None:
        """Close the connection at once."""
        self.gathered = None
        self.transport.abort()

    def _poll(self) -> bytes:
        # The descriptor of a closed transport may be another connection's.
        if not self._is_polled or self._socket is None or self.transport.is_closing():
            return b""
        try:
            data = os.read(self._socket, RECEIVE_BUFFER)
        except BlockingIOError:
            return b""
        except OSError:
            data, self._is_reset = b"", True
        if not data:  # the end, or an error, which the transport finds as well
            self._socket = None
            self.stop_holding()
        return data


def readable_socket(transport: asyncio.BaseTransport) -> int | None:
    """The file descriptor whose bytes are those of the protocol; None for TLS."""
    if transport.get_extra_info("sslcontext") is not None:
        return None
    descriptor: int = transport.get_extra_info("socket").fileno()
    return descriptor
