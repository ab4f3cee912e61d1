"""A response of an HTTP server, whose body is passed on in the turn of the event loop that receives it.

A read wakes no task. Errors contain neither headers nor bodies, and so no secrets.
"""

import asyncio
import math
import re
from collections.abc import Callable
from types import TracebackType
from typing import Self

from imstream.ai.held_connection import RECEIVE_BUFFER, HeldConnection


class HttpError(Exception):
    """A request has failed."""


class ConnectionLost(HttpError):  # noqa: N818 - reads as what happened
    """The connection was lost before the head of the response."""


class BadResponse(HttpError):  # noqa: N818 - same
    """The response is not valid HTTP, or its head is too long."""


class BodyBroken(HttpError):  # noqa: N818 - same
    """The body is incomplete: the connection was lost, or the rest is not valid HTTP."""


class ResponseTooLarge(BodyBroken):
    """The response is larger than the limit."""


Failure = tuple[type[HttpError], str]
"""An error that is not raised yet: a traceback would keep the answer of its caller alive."""


class Response:
    """A response whose head has been received. Leaving its context before the end of the body closes the connection.

    Attributes:
        status: The status; 0 before the head is received.
        headers: Values by the name in lower case; those of the same name are joined with commas.
        received: Bytes of the body so far.
        failure: Why the end of the body will never be received, if so.
    """

    def __init__(self, connection: HeldConnection) -> None:
        self.status = self.received = 0
        self.headers: dict[str, str] = {}
        self.failure: Failure | None = None
        self._connection: HeldConnection | None = connection  # None: nothing will be received
        self._buffer = b""
        self._waiter: asyncio.Future[None] | None = None
        self._on_data: Callable[[bytes], bool | None] | None = None
        self._after_read: Callable[[HeldConnection], None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.abort()

    @property
    def content_type(self) -> str:
        """The media type in lower case, without parameters; empty without a `Content-Type`."""
        return re.split("[;,]", self.headers.get("content-type", ""), maxsplit=1)[0].strip().lower()

    @property
    def is_encoded(self) -> bool:
        """Whether the body has a content encoding, although `identity` was requested."""
        codings = self.headers.get("content-encoding", "").split(",")
        return any(coding.strip().lower() not in {"", "identity"} for coding in codings)

    @property
    def at_end(self) -> bool:
        """Whether the whole body has been received and read."""
        return self._connection is None and self.failure is None and not self._buffer

    async def read(self) -> bytes:
        """Read what has been received, or else what is received next; empty at the end. Raises `BodyBroken`."""
        parts = list[bytes]()
        await self.stream(parts.append)  # returns None: it takes one
        return parts[0]

    async def read_all(self, limit: float = math.inf) -> bytes:
        """Read the whole body, or the beginning of one that has more than `limit` bytes. Raises `BodyBroken`."""
        body = bytearray()
        while len(body) <= limit and (data := await self.read()):
            body += data
        return bytes(body)

    async def stream(
        self,
        on_data: Callable[[bytes], bool | None],
        after_read: Callable[[HeldConnection], None] | None = None,
    ) -> None:
        """Call `on_data` with each part of the body as soon as it is received, and with `b""` at its end.

        `on_data` returns whether it takes more; the rest can be read or streamed later. `after_read` is called after
        each read but the last; it may hold the connection. Raises `BodyBroken`, and what `on_data` raises.
        """
        data, self._buffer = self._buffer, b""
        if data and not on_data(data):
            return
        if self._connection is not None:
            self._connection.resume_reading()
            self._on_data, self._after_read = on_data, after_read
            try:
                if after_read is not None:
                    after_read(self._connection)
                await self.wait()
                if self._on_data is None:
                    return
            finally:
                self._on_data = self._after_read = None
        self.check()
        on_data(b"")

    # Called by the connection

    async def wait(self) -> None:
        """Wait for the head, or for the end of the body or of its delivery."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """End `wait`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def check(self) -> None:
        """Raise what has ended the response too early, if anything has."""
        if self.failure is not None:
            kind, text = self.failure
            raise kind(text)

    def receive(self, data: bytes) -> None:
        """Take what a read contained of the body, which may be nothing."""
        if self._on_data is None or self._waiter is None or self._waiter.done():
            self._buffer += data
            if len(self._buffer) > RECEIVE_BUFFER and self._connection is not None:
                self._connection.pause_reading()
            return
        try:
            is_ready = not data or self._on_data(data)
        except Exception as error:  # noqa: BLE001 - raised by `stream`
            self._waiter.set_exception(error)
            is_ready = False
        if not is_ready:
            self._on_data = None
            self.wake()
        elif self._after_read is not None and self._connection is not None:
            self._after_read(self._connection)

    def end(self, data: bytes, failure: Failure | None) -> None:
        """Take the last part of the body. `failure`: why the rest is missing, if the body is incomplete."""
        self._connection, self.failure = None, failure
        self.receive(data)
        self.wake()
