"""The other side of one call: waits that end when the caller leaves, and the answer written piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY = 8 * 1024 * 1024
"""Largest body of a call, in bytes."""

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"

_NAME = (b"server", b"imstream-demo (canned answers, no model)")


class Gone(Exception):  # noqa: N818 - reads as the state that it names
    """The caller closed the connection; nobody reads the answer any more."""


class BodyTooBig(Exception):  # noqa: N818 - their fault, not an error of ours
    """The body of a call is larger than `MAX_BODY`."""


class Caller:
    """One HTTP exchange. Nothing but the connection is kept here."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._gone: asyncio.Task[Message] | None = None

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            BodyTooBig: It is larger than `MAX_BODY`.
            Gone: The caller left before all of it was there.
        """
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Gone
            parts.append(message["body"])
            size += len(message["body"])
            if size > MAX_BODY:
                raise BodyTooBig
            if not message.get("more_body"):
                return b"".join(parts)

    async def pause(self, seconds: float) -> None:
        """Wait; 0 and less is no wait at all.

        Raises:
            Gone: The caller left meanwhile.
        """
        if seconds <= 0:
            return
        await asyncio.wait((self._leaving(),), timeout=seconds)
        self.check()

    async def pace(self, seconds: float) -> None:
        """A short wait that costs half of what `pause` does and notices only at its end that the caller left.

        Raises:
            Gone: The caller left.
        """
        self._leaving()
        await asyncio.sleep(seconds)
        self.check()

    async def silence(self) -> None:
        """Wait until the caller leaves, for ever if need be.

        Raises:
            Gone: It left.
        """
        await self._leaving()
        raise Gone

    def check(self) -> None:
        """Go on only if somebody reads.

        Raises:
            Gone: The caller left.
        """
        if self._gone is not None and self._gone.done():
            raise Gone

    async def start(self, status: int, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        """Send the head of the answer."""
        head = [(b"content-type", content_type), (b"cache-control", b"no-store"), _NAME, *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the answer; `more=False` ends it. An answer that is never ended is cut by the server."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def reply(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        """Send a whole JSON answer."""
        await self.start(status, JSON, (b"content-length", b"%d" % len(body)), *headers)
        await self.write(body, more=False)

    def close(self) -> None:
        """Stop watching the connection."""
        if self._gone is not None:
            self._gone.cancel()

    def _leaving(self) -> asyncio.Task[Message]:
        """The task that ends when the caller leaves: after the body no other message comes."""
        if self._gone is None:
            self._gone = asyncio.ensure_future(_receive_one(self._receive))
        return self._gone


async def _receive_one(receive: Receive) -> Message:
    return await receive()
