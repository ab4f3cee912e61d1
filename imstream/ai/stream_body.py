"""The body of a response, handed on where it arrives: in the callback of its connection.

To wait for each read instead costs a future, a turn of the event loop, and waking the task with every coroutine that it
is in: 5 to 8 % of a node's CPU under paced answers. So a protocol of ours stands before aiohttp's: it lets aiohttp make
body of the bytes, and passes on what has come. It also stands behind it, where aiohttp's body asks for more: after each
piece that is taken, aiohttp 3.14 would parse once more, nothing, and ask a transport to read on that is reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
from aiohttp.client_proto import ResponseHandler

from imstream.ai.bounded_http import BoundedHandler


class BodyBroken(Exception):  # noqa: N818 - reads as what happened
    """The body will not come to its end. `cause`: what aiohttp says of it."""

    def __init__(self, cause: aiohttp.ClientError | OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def stream_body(response: aiohttp.ClientResponse, take: Callable[[bytes], bool]) -> None:
    """Give each piece of the body to `take` as soon as it is there, and `b""` at its end, until it wants no more.

    `take` returns whether it wants more. What it leaves can be read from `response.content`.

    Raises:
        BodyBroken: The connection was lost within the body, or it is not valid HTTP.
        Exception: Whatever `take` raises.
    """
    way = _Way(response, take)
    way.begin()
    try:
        await way.ended
    finally:
        way.end()


class _Way(asyncio.Protocol):
    """Stands between the transport of a response and aiohttp's protocol, and between that and the body of the response.

    From `begin` to `end`.
    """

    def __init__(self, response: aiohttp.ClientResponse, take: Callable[[bytes], bool]) -> None:
        self._content = response.content
        self._take = take
        self._handler: BoundedHandler | None = None
        self._lost = False
        self._transport: asyncio.Transport | None = None
        if response.connection is not None:  # None: the body came with the head, all of it
            assert isinstance(response.connection.protocol, BoundedHandler)  # noqa: S101 - it is of a bounded session
            self._handler = response.connection.protocol
            self._transport = response.connection.transport
            self._lost = self._transport is None
        self._held = True
        """Whether aiohttp may have left unread what came, because it was much."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        if self._transport is not None:
            self._transport.set_protocol(self)
            self._content._protocol = self  # type: ignore[assignment] # noqa: SLF001 - there is no other way in
        self._pass_on()  # what came with the head

    def end(self) -> None:
        # Errors, ours and those that aiohttp keeps, have our frames in their traces: with us, the answer would stay.
        del self.ended, self._take
        if self._transport is not None and self._handler is not None:
            self._content._protocol = self._handler  # noqa: SLF001 - as it was
            if self._transport.get_protocol() is self:
                self._transport.set_protocol(self._handler)
            self._read_on()

    def data_received(self, data: bytes) -> None:
        handler = self._handler
        assert handler is not None  # noqa: S101 - this protocol was set
        handler.left -= len(data)
        if handler.left >= 0:
            ResponseHandler.data_received(handler, data)  # past its limits, which is a step less
        else:
            handler.left += len(data)
            handler.data_received(data)
        self._pass_on()

    def eof_received(self) -> None:
        assert self._handler is not None  # noqa: S101 - same
        self._handler.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._handler is not None  # noqa: S101 - same
        self._handler.connection_lost(exc)
        self._lost = True
        self._pass_on()

    def pause_reading(self) -> None:
        assert self._handler is not None  # noqa: S101 - same
        self._held = True
        self._handler.pause_reading()

    def resume_reading(self, **_: bool) -> None:
        """Called by the body when a piece was read. Only when all that is there is taken does aiohttp read on."""

    def pause_writing(self) -> None:
        assert self._handler is not None  # noqa: S101 - same
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        assert self._handler is not None  # noqa: S101 - same
        self._handler.resume_writing()

    def _pass_on(self) -> None:
        if self.ended.done():
            return
        try:
            wants_more = self._take_what_is_there()
        except Exception as error:  # noqa: BLE001 - for whoever waits
            self.ended.set_exception(error)
        else:
            if not wants_more:
                self.ended.set_result(None)

    def _take_what_is_there(self) -> bool:
        content = self._content
        while True:
            try:
                data = content.read_nowait()
            except (aiohttp.ClientError, OSError) as error:
                if not (data := content._read_nowait(-1)):  # noqa: SLF001 - what came before the error counts
                    raise BodyBroken(error) from None
            wants_more = self._take(data) if data else True
            if not (wants_more and self._held):
                break
            self._read_on()
        if wants_more and content.is_eof():
            self._take(b"")
            return False
        if wants_more and self._lost:  # aiohttp does not tell the body when it has closed a connection itself
            raise BodyBroken(aiohttp.ClientPayloadError())
        return wants_more

    def _read_on(self) -> None:
        held, self._held = self._held, False
        if held and self._handler is not None:
            self._handler.resume_reading()  # it may be much again
