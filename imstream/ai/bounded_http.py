"""HTTP connections to servers that are not trusted: head, body and socket buffer of every response are bounded.

aiohttp bounds each header field and their number (8190 bytes, 128), but neither interim responses (1xx) nor bytes that
nobody asked for. It also reads as much as the kernel has: several megabytes in one turn of the event loop.
"""

from __future__ import annotations

import socket
from asyncio import AbstractEventLoop
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, cast

import aiohttp
from aiohappyeyeballs import AddrInfoType
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

HEAD_LIMIT = 32 * 1024
"""Maximum bytes of the head of a response, with all interim responses before it."""

RECEIVE_BUFFER = 32 * 1024
"""Size of the kernel's receive buffer that is asked for. It bounds what one turn of the event loop has to parse."""

OVERHEAD_LIMIT = 512 * 1024
"""Maximum bytes of a response that are no body, such as the sizes of its chunks, beyond as many as the body has."""

_SLICE = 2048
"""Bytes of a head that are parsed at once: how far beyond the limit a read can take it."""


class ResponseTooLarge(aiohttp.ClientPayloadError):
    """The body of a response is larger than the limit."""


class BoundedHandler(ResponseHandler):
    """aiohttp's protocol of one connection, with limits for each response.

    A response that nobody has asked for ends the connection, too: aiohttp would take it for that of the next request.
    """

    def __init__(self, loop: AbstractEventLoop, *, limit: int) -> None:
        super().__init__(loop)
        self._limit = limit
        self.left = 0
        """Bytes that may come before the limits are looked at again. A protocol in front of this one counts, too."""
        self._head_left = 0
        self._allowed = 0

    def set_response_params(self, **params: Any) -> None:  # noqa: ANN401 - handed through
        """Called by aiohttp when a request is about to be sent."""
        if len(self):
            self._buffer.clear()
            self._refuse()
        self._head_left = HEAD_LIMIT
        self.left = self._allowed = OVERHEAD_LIMIT
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop, and by aiohttp itself (without data) to parse what it has put aside."""
        payload = self._payload
        if payload is None or payload.is_eof():
            self._receive_head(data)
            return
        self.left -= len(data)
        if self.left < 0 and not self._may_go_on(payload):
            self._refuse()
            return
        super().data_received(data)

    def _may_go_on(self, payload: StreamReader) -> bool:
        """Whether there may be more of a response; asked now and then only, not at each read."""
        taken = self._allowed - self.left
        allowed = min(self._limit, OVERHEAD_LIMIT + 2 * payload.total_bytes)
        if taken <= allowed:
            self._allowed, self.left = allowed, allowed - taken
            return True
        what = "a response" if taken > self._limit else f"{payload.total_bytes} bytes in a response"
        payload.set_exception(ResponseTooLarge(f"{what} of more than {allowed} bytes"))
        return False

    def _receive_head(self, data: bytes) -> None:
        if not data:
            super().data_received(data)
        while data and self.exception() is None and (self._payload is None or self._payload.is_eof()):
            piece, data = data[:_SLICE], data[_SLICE:]
            self._head_left -= len(piece)
            if self._head_left < 0:
                self.set_exception(HttpProcessingError(message="the head is too long"))
                self._refuse()
                return
            super().data_received(piece)
        if data and self.exception() is None:
            self.data_received(data)

    def _refuse(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _NoCookies(aiohttp.DummyCookieJar):
    """Keeps no cookies, and does not parse them either."""

    def update_cookies_from_headers(self, headers: Sequence[str], response_url: URL) -> None:
        """See `aiohttp.abc.AbstractCookieJar`."""


def bounded_session(*, headers: dict[str, str], limit: int, keep_alive: timedelta) -> aiohttp.ClientSession:
    """A session without time limits (they are the caller's) and without a limit on the number of connections.

    Args:
        headers: Headers of every request.
        limit: Maximum bytes of the body of a response, as they come over the wire.
        keep_alive: How long an unused connection is kept.
    """
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=keep_alive.total_seconds(), socket_factory=_small_socket
    )
    handler = partial(BoundedHandler, connector._loop, limit=limit)  # noqa: SLF001 - there is no other way in
    connector._factory = cast("partial[ResponseHandler]", handler)  # noqa: SLF001 - same
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=_NoCookies(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
        auto_decompress=False,  # a kilobyte may become a megabyte
        read_bufsize=RECEIVE_BUFFER,
    )


ENCODED = "a body with a content encoding, which is not read"


def is_encoded(response: aiohttp.ClientResponse) -> bool:
    """Whether the body is compressed or encoded otherwise, though `identity` was asked for."""
    codings = ",".join(response.headers.getall("Content-Encoding", ())).split(",")
    return any(coding.strip().lower() not in {"", "identity"} for coding in codings)


def _small_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return made
